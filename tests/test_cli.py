"""The commands as a person uses them: what they write, what they say, and how they end."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import GOLDEN
from PIL import Image, ImageDraw

from cembed import __version__
from cembed.cli import main
from cembed.runtime import Bundle, Embedder, VectorFile, maxsim
from cembed.runtime.manifest import MANIFEST
from cembed.runtime.manifest_file import write_manifest

COMMANDS = ("export", "quantize", "inspect", "verify", "embed", "search", "eval")
CHECKPOINT = GOLDEN / "causalqwen2_5"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; nothing else may have been said."""
        assert self.out == ""
        assert self.err.splitlines() == [self.err.rstrip("\n")], self.err
        assert self.err.startswith("error: ")
        assert "Traceback" not in self.err
        assert self.status == 1
        return self.err.removeprefix("error: ").rstrip("\n")


def cembed(*arguments: object) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["cembed", *map(str, arguments)])
        patch.setenv("COLUMNS", "250")
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return Outcome(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def cembed_process(*arguments: object) -> Outcome:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-c", "from cembed.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def picture(text: str, size: tuple[int, int] = (160, 120)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((8, 8), text, fill="black")
    return image


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pages in two files."""
    folder = tmp_path_factory.mktemp("good")
    pages = [picture("first"), picture("second", (120, 160))]
    pages[0].save(folder / "report.pdf", save_all=True, append_images=pages[1:])
    (folder / "Anhänge").mkdir()
    picture("photo").save(folder / "Anhänge" / "写真.png")
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files that cannot be read."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.pdf").touch()
    picture("cut").save(folder / "cut.jpg")
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 9 // 10])
    return folder


@pytest.fixture(scope="module")
def vectors(causal_bundle: Path, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "pages.npz"
    assert cembed("embed", causal_bundle, good, "--out", path).status == 0
    return path


@pytest.fixture
def damaged(causal_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with another bit in its tokenizer."""
    root = Path(shutil.copytree(causal_bundle, tmp_path / "damaged"))
    content = bytearray((root / "tokenizer.json").read_bytes())
    content[len(content) // 2] ^= 1
    (root / "tokenizer.json").write_bytes(content)
    return root


# The program.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    outcome = cembed(command, "--help")
    assert outcome.status == 0
    assert f"cembed {command}" in outcome.out
    assert not outcome.err
    assert command in cembed("--help").out


@pytest.mark.parametrize(
    "values",
    [
        "{qwen2-vl,qwen2.5-vl,paligemma}",
        "{causal,feedback,metaembed,btoks,colbert}",
        "{fp32,fp16,bf16}",
        "{onnxruntime,onnx,tensorrt}",
    ],
)
def test_help_lists_the_values_of_flags(values: str) -> None:
    assert values in "".join(cembed("export", "--help").out.split())


def test_version() -> None:
    assert cembed("--version") == Outcome(0, f"cembed {__version__}\n", "")


def test_the_script_is_installed() -> None:
    script = Path(sys.executable).with_name("cembed")
    if not script.exists():
        pytest.skip("cembed is not installed as a package")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"cembed {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage"),
        (["frobnicate"], "frobnicate"),
        (["embed"], "BUNDLE"),
        (["inspect", "x", "--bogus"], "--bogus"),
        (["search", "v.npz", "q"], "--bundle"),
        (["search", "v.npz", "q", "--bundle", "b", "--top", "many"], "--top"),
        (["embed", "b", "p", "--out", "v.npz", "--dpi", "0"], "--dpi"),
        (["embed", "b", "p", "--out", "v.npz", "--timeout", "nan"], "--timeout"),
        (["embed", "b", "p", "--out", "v.npz", "--num-vectors", "0"], "--num-vectors"),
    ],
)
def test_a_command_line_that_cannot_be_parsed(arguments: Sequence[str], words: str) -> None:
    outcome = cembed(*arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.out


# Mistakes: one line each.

MISTAKES = [
    ("embed {tmp}/none {page} --out {tmp}/v.npz", "{tmp}/none is not a bundle"),
    ("embed {page} {page} --out {tmp}/v.npz", "is not a bundle"),
    ("embed {bundle} {tmp}/none.pdf --out {tmp}/v.npz", "no such file or folder: {tmp}/none.pdf"),
    ("embed {bundle} {tmp} --out {tmp}/v.npz", "found no documents in {tmp}"),
    ("embed {bundle} {bundle}/text.onnx --out {tmp}/v.npz", ".pdf, .png"),
    ("embed {bundle} {page} --out {tmp}/v.npy", ".npz or .safetensors"),
    ("embed {bundle} {page} --out {tmp}/nowhere/v.npz", "{tmp}/nowhere"),
    ("embed {bundle} {page} --out {tmp}/v.npz --num-vectors 9000", "positions"),
    ("embed {bundle} {page} --out {tmp}/v.npz --max-visual-tokens 3", "4 to 96"),
    ("embed {bundle} {page} --out {tmp}/v.npz --max-visual-tokens 97", "4 to 96"),
    ("embed {bundle} {page} --out {tmp}/v.npz --provider FooProvider", "CPUExecutionProvider"),
    ("embed {bundle} {page} --out {tmp}/v.npz --timeout inf", "timeout"),
    ("embed {damaged} {page} --out {tmp}/v.npz", "tokenizer.json"),
    ("search {tmp}/none.npz query --bundle {bundle}", "{tmp}/none.npz"),
    ("search {vectors} query --bundle {tmp}/none", "{tmp}/none is not a bundle"),
    ("search {page} query --bundle {bundle}", ".npz or .safetensors"),
    ("search {vectors} <|image_pad|> --bundle {bundle}", "<|image_pad|>"),
    ("search {vectors} query --bundle {bundle} --query-vectors 9000", "positions"),
    ("search {vectors} query --bundle {bundle} --provider FooProvider", "CPUExecutionProvider"),
    ("inspect {tmp}/none", "{tmp}/none is not a bundle"),
    ("verify {tmp}/none", "{tmp}/none is not a bundle"),
    ("verify {page}", "is not a bundle"),
    ("export {from} --backbone foo", "qwen2-vl, qwen2.5-vl, paligemma"),
    ("export {from} --backbone qwen2-vl", "use --backbone qwen2.5-vl"),
    ("export {from} --backbone qwen2.5-vl --head foo", "causal, feedback, metaembed, btoks, colbert"),
    ("export {from} --backbone qwen2.5-vl --head colbert", "--head causal"),
    ("export {from} --backbone qwen2.5-vl --dtype int7", "fp32, fp16, bf16"),
    ("export {from} --backbone qwen2.5-vl --target foo", "onnxruntime, onnx"),
    ("export {from} --backbone qwen2.5-vl --opset 99", "18 to 25"),
    ("export {from} --backbone qwen2.5-vl --opset 17", "18 to 25"),
    ("export {from} --backbone qwen2.5-vl --slot-positions foo", "zero, continue"),
    ("export {from} --backbone qwen2.5-vl --prompt-attention foo", "causal, bidirectional"),
    ("export {from} --backbone qwen2.5-vl --num-vectors 0", "at least 1"),
    ("export {from} --backbone qwen2.5-vl --query-vectors -1", "at least 1"),
    ("export {from} --backbone qwen2.5-vl --max-visual-tokens 3", "the smallest image takes 4"),
    ("export {from} --backbone qwen2.5-vl --latent-token <none>", "--latent-token"),
    ("export {from} --backbone qwen2.5-vl --query-prefix {{text}}", "exactly once"),
    ("export {from} --backbone qwen2.5-vl --adapter {tmp}/none", "{tmp}/none"),
    ("export --model {tmp}/none --out {tmp}/b --backbone qwen2.5-vl", "no checkpoint at"),
    ("export --model {tmp} --out {tmp}/b --backbone qwen2.5-vl", "{tmp} has no"),
    ("export --model {checkpoint} --out {bundle} --backbone qwen2.5-vl", "--force"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line(
    line: str, words: str, causal_bundle: Path, damaged: Path, vectors: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("mistake")
    values = {
        "bundle": causal_bundle,
        "damaged": damaged,
        "vectors": vectors,
        "tmp": tmp,
        "page": CHECKPOINT / "small.png",
        "checkpoint": CHECKPOINT,
        "from": f"--model {CHECKPOINT} --out {tmp}/bundle",
    }
    before = (causal_bundle / MANIFEST).read_bytes()
    assert words.format(**values) in cembed(*line.format(**values).split()).error
    assert not list(tmp.iterdir())
    assert (causal_bundle / MANIFEST).read_bytes() == before


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA")
@pytest.mark.parametrize("more", [[], ["--provider", "CPUExecutionProvider"]])
def test_a_provider_that_is_not_available(causal_bundle: Path, vectors: Path, more: Sequence[str]) -> None:
    message = cembed("search", vectors, "q", "--bundle", causal_bundle, "--provider", "CUDAExecutionProvider", *more)
    assert "CUDAExecutionProvider" in message.error
    assert all(name in message.error for name in onnxruntime.get_available_providers())


@pytest.mark.parametrize("query", ["", "   "])
def test_an_empty_query(causal_bundle: Path, vectors: Path, query: str) -> None:
    assert "empty" in cembed("search", vectors, query, "--bundle", causal_bundle).error


def test_the_vectors_of_another_bundle(causal_bundle: Path, vectors: Path, tmp_path: Path) -> None:
    another = Path(shutil.copytree(causal_bundle, tmp_path / "another"))
    write_manifest(another, (another / MANIFEST).read_text() + "\n")
    assert "another bundle" in cembed("search", vectors, "query", "--bundle", another).error


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(tmp_path: Path, place: str) -> None:
    command = ["inspect", tmp_path / "none"]
    outcome = cembed_process(*(["--debug", *command] if place == "before" else [*command, "--debug"]))
    assert outcome.status == 1
    assert "Traceback" in outcome.err
    assert "CembedError" in outcome.err


def test_without_debug_there_is_none(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in cembed_process("inspect", tmp_path / "none").error


def test_a_fault_of_ours_is_one_line_too(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("cembed.runtime.bundle.Bundle.__init__", fail)
    assert "ZeroDivisionError: of all things" in cembed("inspect", causal_bundle).error


def test_an_interrupt(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cembed.runtime.bundle.Bundle.__init__", interrupt)
    outcome = cembed("inspect", causal_bundle)
    assert outcome.status == 130
    assert outcome.err == "interrupted\n"


# export


def test_export_replaces_with_force(tmp_path: Path) -> None:
    bundle = tmp_path / "folder" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "junk").touch()
    (bundle / "manifest.json").touch()
    options = ["--num-vectors", 5, "--query-vectors", 3, "--max-visual-tokens", 16, "--force"]
    outcome = cembed("export", "--backbone", "qwen2.5-vl", "--model", CHECKPOINT, "--out", bundle, *options)
    assert outcome.status == 0, outcome.err
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    manifest = Bundle(bundle).manifest
    assert (manifest.document.num_vectors, manifest.query.num_vectors) == (5, 3)
    assert manifest.image.max_visual_tokens == 16
    assert "5 vectors of 96" in outcome.out
    assert str(bundle) in outcome.out


# inspect and verify


def test_inspect(causal_bundle: Path) -> None:
    outcome = cembed("inspect", causal_bundle)
    assert outcome.status == 0
    for words in (
        "qwen2.5-vl, causal head",
        "8 vectors of 96",
        "4 vectors of 96",
        "at most 96",
        "text.onnx",
        "opset 24",
    ):
        assert words in outcome.out


def test_inspect_as_json(causal_bundle: Path) -> None:
    outcome = cembed("inspect", causal_bundle, "--json")
    assert outcome.status == 0
    shown = json.loads(outcome.out)
    assert shown.pop("hash") == Bundle(causal_bundle).hash
    assert shown == json.loads((causal_bundle / MANIFEST).read_text())


def test_verify(causal_bundle: Path) -> None:
    outcome = cembed("verify", causal_bundle)
    assert outcome.status == 0
    assert {line.split()[0] for line in outcome.out.splitlines()} == {"ok"}
    checks = json.loads(cembed("verify", causal_bundle, "--json").out)
    assert len(checks) == len(outcome.out.splitlines())
    assert all(check["passed"] for check in checks)


@pytest.mark.parametrize("name", ["text.data", "self_test.png", "tokenizer.json", "token_embeddings.bin"])
def test_verify_of_a_damaged_bundle(causal_bundle: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (root / name).write_bytes(content)
    outcome = cembed("verify", root)
    assert outcome.status == 1
    assert any(line.startswith("FAILED") and name in line for line in outcome.out.splitlines())
    assert any(line.startswith("ok") for line in outcome.out.splitlines())
    outcome = cembed("verify", root, "--json")
    assert outcome.status == 1
    assert f"sha256 of {name}" in [check["name"] for check in json.loads(outcome.out) if not check["passed"]]


# embed


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_embed(causal_bundle: Path, good: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"v{suffix}"
    outcome = cembed("embed", causal_bundle, good, "--out", out)
    assert outcome.status == 0
    assert outcome.out.startswith(f"{out}: 3 pages, 24 vectors of 96, ")
    content, embedder = VectorFile.load(out), Embedder.load(causal_bundle)
    pages = set(zip(content.paths, content.pages.tolist(), strict=True))
    assert pages == {(f"{good}/report.pdf", 1), (f"{good}/report.pdf", 2), (f"{good}/Anhänge/写真.png", 1)}
    assert content.bundle == embedder.bundle.hash
    photo = content.documents()[content.paths.index(f"{good}/Anhänge/写真.png")]
    assert np.array_equal(photo, embedder.embed_image(Image.open(good / "Anhänge" / "写真.png")))


def test_nothing_is_drawn_where_there_is_no_terminal(causal_bundle: Path, tmp_path: Path) -> None:
    outcome = cembed("embed", causal_bundle, CHECKPOINT / "small.png", "--out", tmp_path / "v.npz")
    assert outcome.status == 0
    assert outcome.err == ""


@pytest.mark.parametrize(("options", "rows"), [(["--num-vectors", 3], 9), (["--max-visual-tokens", 4], 24)])
def test_embed_with_less(
    causal_bundle: Path, good: Path, vectors: Path, tmp_path: Path, options: Sequence[object], rows: int
) -> None:
    assert cembed("embed", causal_bundle, good, "--out", tmp_path / "v.npz", *options).status == 0
    content, full = VectorFile.load(tmp_path / "v.npz"), VectorFile.load(vectors)
    assert len(content.vectors) == rows
    same = all(
        np.allclose(a, b[: len(a)], atol=1e-6) for a, b in zip(content.documents(), full.documents(), strict=True)
    )
    assert same == ("--num-vectors" in options)


def test_embed_reports_what_it_could_not_read(causal_bundle: Path, good: Path, bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    outcome = cembed("embed", causal_bundle, bad, good, "--out", out)
    assert outcome.status == 3
    reports = [line for line in outcome.err.splitlines() if line.startswith("not embedded: ")]
    assert len(reports) == 2
    cut, empty = sorted(reports)
    assert cut.startswith(f"not embedded: {bad}/cut.jpg, page 1: ")
    assert empty == f"not embedded: {bad}/empty.pdf: the file is empty"
    assert "truncated" in cut
    assert "Traceback" not in outcome.err
    content = VectorFile.load(out)
    assert len(content) == 3
    assert all(path.startswith(str(good)) for path in content.paths)


def test_embed_of_nothing_but_bad_pages(causal_bundle: Path, bad: Path, tmp_path: Path) -> None:
    outcome = cembed("embed", causal_bundle, bad, "--out", tmp_path / "v.npz")
    assert outcome.status == 1
    lines = outcome.err.splitlines()
    assert len([line for line in lines if line.startswith("not embedded: ")]) == 2
    assert lines[-1].startswith("error: none of the 2 pages")
    assert not outcome.out
    assert not list(tmp_path.iterdir())


def test_embed_does_not_replace_a_file_unless_told(causal_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    out.write_bytes(b"precious")
    command = ("embed", causal_bundle, CHECKPOINT / "small.png", "--out", out)
    assert "--force" in cembed(*command).error
    assert out.read_bytes() == b"precious"
    assert cembed(*command, "--force").status == 0
    assert len(VectorFile.load(out)) == 1


def test_embed_failing_with_force_keeps_the_file(causal_bundle: Path, bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    out.write_bytes(b"precious")
    assert cembed("embed", causal_bundle, bad, "--out", out, "--force").status == 1
    assert out.read_bytes() == b"precious"


def test_pages_of_extreme_sizes(causal_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("1", (100_000, 100)).save(tmp_path / "line.png")
    outcome = cembed("embed", causal_bundle, tmp_path, "--out", tmp_path / "v.npz")
    assert outcome.status == 3
    (report,) = [line for line in outcome.err.splitlines() if line.startswith("not embedded: ")]
    assert f"{tmp_path}/line.png, page 1: an image of 100000 x 100 pixels" in report
    assert VectorFile.load(tmp_path / "v.npz").paths == (str(tmp_path / "dot.png"),)


def test_a_process_of_its_own(causal_bundle: Path, good: Path, bad: Path, tmp_path: Path) -> None:
    """Statuses reach the shell, and names that are not ASCII survive the pipes."""
    out = tmp_path / "ベクトル.safetensors"
    outcome = cembed_process("embed", causal_bundle, good, bad, "--out", out)
    assert outcome.status == 3
    assert f"{bad}/empty.pdf" in outcome.err
    outcome = cembed_process("search", out, "photo", "--bundle", causal_bundle, "--json")
    assert outcome.status == 0
    assert f"{good}/Anhänge/写真.png" in [row["path"] for row in json.loads(outcome.out)]


# search


def test_search_ranks_by_maxsim(causal_bundle: Path, vectors: Path) -> None:
    outcome = cembed("search", vectors, "first page", "--bundle", causal_bundle, "--json")
    assert outcome.status == 0
    rows = json.loads(outcome.out)
    content, embedder = VectorFile.load(vectors), Embedder.load(causal_bundle)
    scores = maxsim([embedder.embed_query("first page")], content.documents())[0]
    best = sorted(range(3), key=lambda i: -scores[i])
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [(row["path"], row["page"]) for row in rows] == [(content.paths[i], content.pages[i]) for i in best]
    assert [row["score"] for row in rows] == pytest.approx([scores[i] for i in best], abs=1e-5)
    assert rows[0]["score"] > rows[2]["score"]
    assert all(set(row) == {"rank", "score", "path", "page"} for row in rows)


def test_search_as_a_table(causal_bundle: Path, vectors: Path) -> None:
    command = ("search", vectors, "first page", "--bundle", causal_bundle)
    outcome = cembed(*command)
    assert outcome.status == 0
    assert "'first page' among 3 pages" in outcome.out
    assert all(column in outcome.out for column in ("rank", "score", "path", "page"))
    places = [outcome.out.index(f"{row['score']:.4f}") for row in json.loads(cembed(*command, "--json").out)]
    assert places == sorted(places)
    assert "写真.png" in outcome.out


@pytest.mark.parametrize(("top", "shown"), [(1, 1), (2, 2), (3, 3), (100, 3)])
def test_search_shows_the_top(causal_bundle: Path, vectors: Path, top: int, shown: int) -> None:
    command = ("search", vectors, "first page", "--bundle", causal_bundle, "--json")
    rows = json.loads(cembed(*command, "--top", top).out)
    assert rows == json.loads(cembed(*command).out)[:shown]
    assert len(rows) == shown


def test_search_with_fewer_query_vectors(causal_bundle: Path, vectors: Path) -> None:
    rows = json.loads(
        cembed("search", vectors, "x", "--bundle", causal_bundle, "--json", "--query-vectors", 1, "--threads", 1).out
    )
    content, embedder = VectorFile.load(vectors), Embedder.load(causal_bundle)
    best = maxsim([embedder.embed_query("x")[:1]], content.documents()).max()
    assert rows[0]["score"] == pytest.approx(best, abs=1e-5)


def test_markup_in_a_query_is_text(causal_bundle: Path, vectors: Path) -> None:
    outcome = cembed("search", vectors, "[red]total[/red] [/]", "--bundle", causal_bundle)
    assert outcome.status == 0
    assert "[red]total[/red] [/]" in outcome.out
