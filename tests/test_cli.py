"""The commands as a person uses them: what they write, what they say, and how they end."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from conftest import GOLDEN
from PIL import Image, ImageDraw

from cembed import __version__
from cembed.cli import main
from cembed.export.choices import BACKBONES
from cembed.options import spread
from cembed.runtime import Bundle, CembedError, Embedder, VectorFile, maxsim
from cembed.runtime.bundle.bundle import sha256
from cembed.runtime.bundle.manifest import MANIFEST, FileRecord
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.engines.quiet import ort as onnxruntime
from cembed.runtime.pages.documents import Page, PageError, PageReader
from cembed.streams import held_stderr

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


def cembed_process(*arguments: object, **options: Any) -> Outcome:
    """Run the command line in a process of its own; `options` as for subprocess.run."""
    command = [sys.executable, "-c", "from cembed.cli import main; main()", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "surrogateescape"}
    done = subprocess.run(command, timeout=60, check=False, **(pipes | options))
    return Outcome(done.returncode, done.stdout or "", done.stderr or "")


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
        "{" + ",".join(BACKBONES) + "}",
        "{causal,feedback,metaembed,btoks,colbert,single}",
        "{fp32,fp16,bf16}",
        "{onnxruntime,onnx,tensorrt}",
    ],
)
def test_help_lists_the_values_of_flags(values: str) -> None:
    assert values in "".join(cembed("export", "--help").out.split())


def test_version() -> None:
    outcome = cembed("--version")
    first, kernels, engines = outcome.out.splitlines()
    assert (outcome.status, first, outcome.err) == (0, f"cembed {__version__}", "")
    assert set(kernels.removeprefix("MaxSim: ").split(", ")) <= {"amx", "avx512", "avx2", "neon", "scalar", "numpy"}
    assert engines.startswith("engines: ONNX Runtime 1.")


def test_the_script_is_installed() -> None:
    script = Path(sys.executable).with_name("cembed")
    if not script.exists():
        pytest.skip("cembed is not installed as a package")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith(f"cembed {__version__}\n")


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
    ("embed {bundle} {page} --out {tmp}/v.npz --max-visual-tokens 3", "the smallest page takes 4, the largest 96"),
    ("embed {bundle} {page} --out {tmp}/v.npz --max-visual-tokens 97", "the smallest page takes 4, the largest 96"),
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
    ("export {from} --backbone foo", ", ".join(BACKBONES)),
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
    ("export {from} --backbone qwen2.5-vl --max-visual-tokens 3", "the smallest page takes 4"),
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


@pytest.mark.parametrize(
    "given",
    [
        ("--provider", "CPUExecutionProvider,FooProvider"),
        ("--provider", "CPUExecutionProvider", "--provider", "FooProvider"),
    ],
)
def test_providers_are_a_list(causal_bundle: Path, vectors: Path, given: Sequence[str]) -> None:
    said = cembed("search", vectors, "q", "--bundle", causal_bundle, *given).error
    assert "FooProvider" in said
    assert ",FooProvider" not in said


@dataclass(frozen=True)
class Group:
    size: Annotated[int, typer.Option(min=1)]
    name: str = "x"


def test_options_of_a_group_stand_where_the_group_is() -> None:
    @spread
    def command(*, first: bool = False, group: Group, last: int) -> tuple[bool, Group, int]:
        return first, group, last

    assert list(inspect.signature(command).parameters) == ["first", "size", "name", "last"]
    assert command(first=True, size=2, name="y", last=3) == (True, Group(2, "y"), 3)


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
    def fail(*_: object, **more: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("cembed.runtime.bundle.bundle.Bundle.__init__", fail)
    assert "ZeroDivisionError: of all things" in cembed("inspect", causal_bundle).error


def test_an_interrupt(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cembed.runtime.bundle.bundle.Bundle.__init__", interrupt)
    outcome = cembed("inspect", causal_bundle)
    assert outcome.status == 130
    assert outcome.err == "interrupted\n"


# Standard output and the system as they may be.


def close_output() -> None:
    """Leaves a pipe that nobody reads from where standard output was."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


COMMANDS_WITH_OUTPUT = ("search {vectors} x --bundle {bundle}", "inspect {bundle} --json", "verify {bundle}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("line", [*COMMANDS_WITH_OUTPUT, "embed {bundle} {page} --out {tmp}/v.npz"])
def test_a_full_disk_behind_standard_output(line: str, causal_bundle: Path, vectors: Path, tmp_path: Path) -> None:
    values = {"bundle": causal_bundle, "vectors": vectors, "page": CHECKPOINT / "small.png", "tmp": tmp_path}
    with open("/dev/full", "w") as full:
        outcome = cembed_process(*line.format(**values).split(), stdout=full)
    assert outcome.error == f"cannot write to standard output: {os.strerror(errno.ENOSPC)}"


@pytest.mark.parametrize("line", COMMANDS_WITH_OUTPUT)
def test_a_pipe_that_nobody_reads(line: str, causal_bundle: Path, vectors: Path) -> None:
    command = line.format(bundle=causal_bundle, vectors=vectors).split()
    assert (
        cembed_process(*command, preexec_fn=close_output).error == "standard output was closed before all was written"
    )


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed(closed: int, causal_bundle: Path, vectors: Path) -> None:
    outcome = cembed_process("search", vectors, "x", "--bundle", causal_bundle, preexec_fn=lambda: os.close(closed))
    assert outcome.status == 0
    assert outcome.err == ""


@pytest.mark.parametrize(("command", "limit"), [("search", 6), ("embed", 9), ("embed", 12)])
def test_few_files_may_be_open(command: str, limit: int, causal_bundle: Path, vectors: Path, tmp_path: Path) -> None:
    """Where it does not suffice, that is said."""
    lines = {"search": f"{vectors} x --bundle {causal_bundle}"}
    lines["embed"] = f"{causal_bundle} {CHECKPOINT / 'small.png'} --out {tmp_path / 'v.npz'}"
    outcome = cembed_process(
        command,
        *lines[command].split(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if outcome.status:
        assert os.strerror(errno.EMFILE) in outcome.error
        assert "report" not in outcome.error


def test_memory_that_does_not_suffice(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cembed.runtime.bundle.bundle.Bundle.__init__", fail)
    assert cembed("inspect", causal_bundle).error == "there is not enough memory (--debug shows where)"


def test_without_home_and_without_a_working_directory(causal_bundle: Path, vectors: Path, tmp_path: Path) -> None:
    def vanish() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    options: dict[str, Any] = {"env": environment, "preexec_fn": vanish}
    assert cembed_process("search", vectors, "x", "--bundle", causal_bundle, **options).status == 0
    outcome = cembed_process("embed", causal_bundle, CHECKPOINT / "small.png", "--out", "v.npz", **options)
    assert outcome.error == f"cannot write v.npz: {os.strerror(errno.ENOENT)}"


def test_a_folder_that_cannot_be_written(causal_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first page; the tests may run as root, whom permissions do not stop."""

    def refuse(self: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("cembed.runtime.pages.documents.PageReader.__init__", None)
    monkeypatch.setattr(Path, "open", refuse)
    message = cembed("embed", causal_bundle, CHECKPOINT / "small.png", "--out", tmp_path / "v.npz").error
    assert message == f"cannot write {tmp_path / 'v.npz'}: {os.strerror(errno.EROFS)}"


LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize(("locale", "suffix"), [("ascii", ".npz"), ("latin-1", ".safetensors"), ("C", ".safetensors")])
def test_any_file_name_in_any_encoding(locale: str, suffix: str, causal_bundle: Path, tmp_path: Path) -> None:
    for name in ("写真 Grüße.png", os.fsdecode(b"caf\xe9.png")):
        picture("page").save(tmp_path / name, format="png")
    (tmp_path / "größe.pdf").touch()
    options: dict[str, Any] = {"env": {**os.environ, **LOCALES[locale], "COLUMNS": "250"}}
    out = tmp_path / f"Öl{suffix}"
    outcome = cembed_process("embed", causal_bundle, tmp_path, "--out", out, **options)
    assert outcome.status == 3, outcome.err
    assert "2 pages" in outcome.out
    command = ("search", out, "page", "--bundle", causal_bundle)
    rows = json.loads(cembed_process(*command, "--json", **options).out)
    assert {os.fsencode(row["path"]) for row in rows} == {os.fsencode(path) for path in tmp_path.glob("*.png")}
    outcome = cembed_process(*command, **options)
    assert outcome.status == 0, outcome.err
    assert len(outcome.out.splitlines()) == 7


# Text from files is shown, not obeyed.

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202e\u2028fdp.exe\x7f\udce9"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202e\u2028fdp.exe\x7f\udce9"


def assert_harmless(outcome: Outcome) -> None:
    """Nothing was written but lines of characters that a terminal shows."""
    text = outcome.out + outcome.err
    assert not [c for c in text if c != "\n" and not c.isprintable()], text
    assert "fdp.exe" in text


def test_a_foreign_vector_file(causal_bundle: Path, tmp_path: Path) -> None:
    embedder, out = Embedder.load(causal_bundle), tmp_path / "v.npz"
    vectors = embedder.embed_query("x", Budget(1))
    VectorFile.of([vectors], [HOSTILE], [1], embedder.bundle.hash, [HOSTILE]).save(out)
    command = ("search", out, "x", "--bundle", causal_bundle)
    outcome = cembed(*command)
    assert_harmless(outcome)
    assert outcome.out.count(SHOWN) == 2
    outcome = cembed(*command, "--json")
    assert_harmless(outcome)
    (row,) = json.loads(outcome.out)
    assert (row["path"], row["warning"]) == (HOSTILE, HOSTILE)


def test_a_foreign_bundle(causal_bundle: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(causal_bundle, tmp_path / f"bundle{HOSTILE}"))
    manifest = json.loads((root / MANIFEST).read_text())
    told = HOSTILE.removesuffix("\udce9")  # a manifest has no half of a surrogate pair
    manifest["source"] = {"model": told}
    manifest["made_with"] = {told: told}
    write_manifest(root, json.dumps(manifest))
    outcome = cembed("inspect", root)
    assert_harmless(outcome)
    assert SHOWN in outcome.out
    outcome = cembed("inspect", root, "--json")
    assert_harmless(outcome)
    assert json.loads(outcome.out)["source"] == {"model": told}
    (root / "text.data").write_bytes(b"")
    assert SHOWN in cembed("inspect", root).error
    (root / "text.data").unlink()
    assert SHOWN in cembed("verify", root).error


def test_foreign_documents(causal_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{HOSTILE}.pdf").touch()
    picture("page").save(folder / f"{HOSTILE}.png", format="png")
    for command in (
        ("embed", causal_bundle, folder, "--out", tmp_path / f"{HOSTILE}.npz"),
        ("search", tmp_path / f"{HOSTILE}.npz", "x", "--bundle", causal_bundle),
        ("search", tmp_path / f"{HOSTILE}.npz", "--image", folder / f"{HOSTILE}.png", "--bundle", causal_bundle),
        ("search", tmp_path / f"{HOSTILE}.npz", HOSTILE, "--bundle", causal_bundle),
        ("embed", causal_bundle, folder, "--out", tmp_path / f"{HOSTILE}.npy"),
        ("embed", causal_bundle, folder / f"{HOSTILE}.tif", "--out", tmp_path / "v.npz"),
        ("eval", causal_bundle, folder / HOSTILE),
    ):
        outcome = cembed(*command)
        assert outcome.status in (0, 1, 3)
        if HOSTILE not in command:
            assert_harmless(outcome)


def with_tokenizer(bundle: Path, root: Path, change: dict[str, Any]) -> Path:
    """A copy of the bundle with another tokenizer, which its manifest names."""
    shutil.copytree(bundle, root)
    path = root / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer |= {name: value for name, value in change.items() if name != "model"}
    tokenizer["model"] |= change.get("model", {})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    bundle_manifest = Bundle(bundle).manifest
    files = {**bundle_manifest.files, path.name: FileRecord(path.stat().st_size, sha256(path))}
    write_manifest(root, replace(bundle_manifest, files=files).to_json())
    return root


PANICS: list[dict[str, Any]] = [
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    {"normalizer": {"type": "Prepend", "prepend": ""}},
    {"model": {"continuing_subword_prefix": "日本"}},
]


@pytest.mark.parametrize("change", PANICS, ids=str)
def test_a_tokenizer_that_its_library_does_not_survive(
    change: dict[str, Any], causal_bundle: Path, tmp_path: Path
) -> None:
    root = with_tokenizer(causal_bundle, tmp_path / "bundle", change)
    with pytest.raises(CembedError, match=r"tokenizer\.json"):
        Embedder.load(root)


def test_a_panic_is_one_line(causal_bundle: Path, vectors: Path, tmp_path: Path) -> None:
    """What the library says of it is not shown."""
    root = with_tokenizer(causal_bundle, tmp_path / "bundle", PANICS[0])
    options: dict[str, Any] = {"env": {**os.environ, "RUST_BACKTRACE": "1"}}
    assert "tokenizer.json" in cembed_process("search", vectors, "x", "--bundle", root, **options).error
    outcome = cembed_process("verify", root, **options)
    assert outcome.status == 1
    assert outcome.err == ""
    assert [line for line in outcome.out.splitlines() if line.startswith("FAILED self-test") and "tokenizer" in line]


def test_a_panic_anywhere_else_is_one_line(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def fail(*_: object, **more: object) -> None:
        raise PanicException("of all things")

    monkeypatch.setattr("cembed.runtime.bundle.bundle.Bundle.__init__", fail)
    assert "PanicException: of all things" in cembed("inspect", causal_bundle).error


def test_what_native_code_says_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with held_stderr():
        os.write(2, b"a word from a library\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a word from a library\n"


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
    assert shown.pop("signed_by") == {}
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


# Runs that end early, and pages in doubt.

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def before_page(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Does something when the page with this number is about to be embedded."""
    embed_image, seen = Embedder.embed_image, []

    def embed(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == number:
            action()
        return embed_image(*arguments)

    monkeypatch.setattr(Embedder, "embed_image", embed)


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_signal_keeps_the_pages_so_far(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, suffix: str
) -> None:
    out = tmp_path / f"v{suffix}"
    before_page(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(each) for each in STATUS]
    outcome = cembed("embed", causal_bundle, good, "--out", out)
    assert outcome == Outcome(
        STATUS[signal.Signals(number)], "", f"interrupted after 2 of 3 pages: {out} has 2 pages\n"
    )
    assert len(VectorFile.load(out)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert [signal.getsignal(each) for each in STATUS] == handlers


def test_a_signal_before_the_first_page(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "v.npz"
    before_page(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = cembed("embed", causal_bundle, good, "--out", out)
    assert outcome == Outcome(143, "", f"interrupted after 0 of 3 pages: {out} was not written\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [True, False], ids=["the second one", "the first one"])
def test_a_signal_while_the_file_is_written(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """It changes nothing: the command is about to end."""
    if first:
        before_page(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    replace_file = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: (os.kill(os.getpid(), signal.SIGINT), replace_file(*paths)))
    outcome = cembed("embed", causal_bundle, good, "--out", tmp_path / "v.npz")
    assert outcome.status == (130 if first else 0)
    assert len(VectorFile.load(tmp_path / "v.npz")) == (2 if first else 3)


def test_a_signal_that_is_ignored_stays_ignored(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after nohup."""
    before_page(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cembed("embed", causal_bundle, good, "--out", tmp_path / "v.npz").status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_the_process_itself(causal_bundle: Path, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    code = "import os, signal; from cembed.runtime import Embedder; from cembed.cli import main; take, n = "
    code += "Embedder.embed_image, []\ndef embed(*a):\n n.append(os.kill(os.getpid(), 15) if len(n) == 1 else 0)\n "
    code += "return take(*a)\nEmbedder.embed_image = embed\nmain()"
    command = [sys.executable, "-c", code, "embed", str(causal_bundle), str(good), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == f"interrupted after 1 of 3 pages: {out} has 1 pages\n"
    assert len(VectorFile.load(out)) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), MemoryError(), OSError(5, "broken"), CembedError("gone")])
def test_what_nobody_expected_keeps_the_pages_so_far(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read = PageReader.read

    def break_off(self: PageReader, paths: Sequence[Path]) -> Iterator[Page | PageError]:
        pages = read(self, paths)
        yield next(pages)
        yield next(pages)
        raise error

    out = tmp_path / "v.npz"
    monkeypatch.setattr(PageReader, "read", break_off)
    outcome = cembed("embed", causal_bundle, good, "--out", out)
    assert outcome.status == 1
    first, last = outcome.err.splitlines()
    assert first == f"ended after 2 of 3 pages: {out} has 2 pages"
    assert last.startswith("error: ")
    assert len(VectorFile.load(out)) == 2


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_disk_that_is_full_at_the_end(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The pages go where there is room."""
    out, spare = tmp_path / "full" / f"v{suffix}", tmp_path / "spare"
    out.parent.mkdir()
    spare.mkdir()
    replace_file = Path.replace

    def refuse(path: Path, to: Path) -> Path:
        if to == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace_file(path, to)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    message = cembed("embed", causal_bundle, good, "--out", out).error
    (kept,) = spare.rglob("*.npz")
    assert message.startswith(f"cannot write {out}: {os.strerror(errno.ENOSPC)}; its 3 pages are in {kept}: ")
    assert len(VectorFile.load(kept)) == 3
    assert not list(out.parent.iterdir())


def test_a_damaged_graph_is_found_before_the_first_page(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))
    content = bytearray((root / "text.data").read_bytes())
    content[len(content) // 2] ^= 1
    (root / "text.data").write_bytes(content)
    dataset = tmp_path / "dataset"
    shutil.copytree(good, dataset / "pages")
    (dataset / "queries.jsonl").write_text('{"_id": "q", "text": "page"}')
    (dataset / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\treport.pdf#1\t1\n")
    monkeypatch.setattr(PageReader, "read", None)
    for command in (
        ("embed", root, good, "--out", tmp_path / "v.npz"),
        ("embed", root, good, "--out", tmp_path / "v.npz", "--decode", "loop"),
        ("index", "add", tmp_path / "index", good, "--bundle", root),
        ("eval", root, dataset),
    ):
        assert cembed(*command).error == f"{root}/text.data does not match its sha256: it is damaged, copy it again"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_pages_in_doubt(
    causal_bundle: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    read, out = PageReader.read, tmp_path / f"v{suffix}"

    def doubt(self: PageReader, paths: Sequence[Path]) -> Iterator[Page | PageError]:
        for page in read(self, paths):
            doubted = isinstance(page, Page) and page.path.endswith("report.pdf") and page.number == 2
            yield replace(page, warning="half of it is white") if doubted and isinstance(page, Page) else page

    monkeypatch.setattr(PageReader, "read", doubt)
    outcome = cembed("embed", causal_bundle, good, "--out", out)
    assert outcome.status == 3
    assert outcome.err == f"warning: {good}/report.pdf, page 2: half of it is white\n"
    assert "3 pages" in outcome.out
    assert sorted(VectorFile.load(out).warnings) == ["", "", "half of it is white"]
    command = ("search", out, "second", "--bundle", causal_bundle)
    rows = json.loads(cembed(*command, "--json").out)
    assert [row.get("warning") for row in rows if row["path"].endswith("pdf") and row["page"] == 2] == [
        "half of it is white"
    ]
    assert sum("warning" in row for row in rows) == 1
    shown = cembed(*command).out
    assert "warning" in shown
    assert "half of it is white" in shown
    monkeypatch.undo()
    cembed("embed", causal_bundle, good, "--out", out, "--force")
    assert "warning" not in cembed(*command).out


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
