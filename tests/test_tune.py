"""`cembed tune`: engines tried, a choice kept beside the bundle, and found again by whoever loads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BundleMaker, golden
from PIL import Image
from test_cli import cembed

from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder, tuning
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.engines import tuned
from cembed.runtime.engines.openvino import OpenVinoSession
from cembed.runtime.engines.providers import open_sessions
from cembed.runtime.engines.session import CPU, EngineSettings, OrtSession
from cembed.runtime.engines.tuned import Tuned
from cembed.runtime.tuning import Trial, Way, best, mixture

pytest.importorskip("openvino", reason="needs OpenVINO: pip install '.[openvino]'")
PAGE = np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8)
BASE, OTHER = CPU[0], "openvino"


@pytest.fixture
def bundle(exported: Callable[[ExportOptions], Path], tmp_path: Path) -> Path:
    standard = exported(replace(golden("causalqwen2_5"), target="onnx", opset=20))
    return Path(shutil.copytree(standard, tmp_path / "bundle"))


def choice(bundle: Path, *providers: str) -> Tuned:
    return Tuned(providers, 1, Bundle(bundle).hash, tuned.machine())


def trial(name: str, cosine: float = 1.0, **seconds: float) -> Trial:
    vector = np.array([[cosine, (1 - cosine**2) ** 0.5]], np.float32)
    return Trial((name,), {"page": sum(seconds.values()), **seconds}, (vector,))


# Engines for single graphs


def test_each_graph_has_its_engine(bundle: Path) -> None:
    opened = open_sessions(Bundle(bundle), EngineSettings(("vision=openvino", BASE), threads=1))
    assert isinstance(opened("vision"), OpenVinoSession)
    assert isinstance(opened("text"), OrtSession)


def test_vectors_are_those_of_one_engine(bundle: Path) -> None:
    mixed, plain = (Embedder.load(bundle, providers=p, threads=1) for p in (["vision=openvino", BASE], [BASE]))
    np.testing.assert_allclose(mixed.embed_images([PAGE])[0], plain.embed_images([PAGE])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        (["audio=openvino"], "graph 'audio': the bundle has vision, text, text_step"),
        (["vision=fast"], "fast is not in"),
    ],
)
def test_graphs_and_engines_that_are_not_there(bundle: Path, providers: list[str], words: str) -> None:
    with pytest.raises(CembedError, match=words):
        Embedder.load(bundle, providers=providers)


# The choice beside the bundle


def test_loading_finds_the_choice(bundle: Path) -> None:
    tuned.write(bundle, choice(bundle, "vision=openvino", BASE))
    assert isinstance(Embedder.load(bundle).session("vision"), OpenVinoSession)
    assert isinstance(Embedder.load(bundle, providers=[BASE]).session("vision"), OrtSession)
    assert Bundle(bundle).hash == choice(bundle).bundle


@pytest.mark.parametrize("field", ["bundle", "machine"])
def test_a_choice_for_something_else_is_not_used(bundle: Path, field: str) -> None:
    tuned.write(bundle, replace(choice(bundle, OTHER), **{field: "another"}))
    with pytest.warns(RuntimeWarning, match=f"of another {field}.*run cembed tune again"):
        embedder = Embedder.load(bundle)
    assert isinstance(embedder.session("text"), OrtSession)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"providers": 3}'])
def test_a_damaged_choice(bundle: Path, content: bytes) -> None:
    tuned.path_of(bundle).write_bytes(content)
    with pytest.raises(CembedError, match=r"bundle\.tuned\.json is damaged .*: run cembed tune again, or remove it$"):
        Embedder.load(bundle)


def test_a_link_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    tuned.path_of(bundle).symlink_to(tuned.write(tmp_path / "other", choice(bundle, BASE)))
    with pytest.raises(CembedError, match="link"):
        Embedder.load(bundle)


# How one is chosen


def test_each_graph_gets_the_fastest_that_is_right() -> None:
    trials = [
        trial(BASE, vision=2.0, text=1.0, text_step=0.1),
        trial(OTHER, vision=1.0, text=2.0, text_step=0.2),
        trial("wrong", 0.9, vision=0.1, text=0.1, text_step=0.01),
        Trial(("absent",), {}, failure="it is not there"),
    ]
    assert mixture(trials, 0.999) == ("vision=openvino", BASE)
    assert mixture(trials, 0.8) == ("vision=wrong", "text=wrong", "text_step=wrong", BASE)
    assert best(trials, 0.999).providers == (BASE,)
    mixed = replace(trial(BASE, vision=1.0, text=1.0, text_step=0.1), providers=("vision=openvino", BASE))
    assert best([*trials, mixed], 0.999) is mixed
    assert best([*trials, replace(mixed, seconds={**mixed.seconds, "text_step": 0.2})], 0.999) is trials[0]


def test_an_engine_that_ends_its_process_is_a_failure(bundle: Path) -> None:
    found = tuning.attempt(Way(bundle, ("audio=openvino",), 1), [PAGE], 1)
    assert "audio" in (found.failure or "")


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    shown = cembed("tune", bundle, "--rounds", "1", "--threads", "1", "--json")
    assert shown.status == 0, shown.err
    made = json.loads(shown.out)
    assert [row["providers"] for row in made["trials"]][:4] == [BASE, "onnxruntime-bf16", OTHER, "openvino-bf16"]
    found = tuned.read(bundle, Bundle(bundle).hash)
    assert found is not None
    assert list(found.providers) == made["chosen"]
    tuned.path_of(bundle).unlink()
    shown = cembed("tune", bundle, bundle / "self_test.png", "--rounds", "1", "--threads", "1", "--dry-run")
    assert "chosen: " in shown.out
    assert "lowest" in shown.out
    assert not tuned.path_of(bundle).exists()


def test_a_bundle_for_onnxruntime_alone(causal_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(causal_bundle, tmp_path / "bundle")
    shown = cembed("tune", bundle, "--rounds", "1", "--threads", "1")
    assert "export it with --target onnx --opset 20" in shown.err
    assert re.search(f"chosen: ({BASE}|vision=onnxruntime-bf16|onnxruntime-bf16)", shown.out)


def test_pages_that_cannot_be_read(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    shown = cembed("tune", bundle, tmp_path / "a.png")
    assert (shown.status, "no page of" in shown.err) == (1, True)


# cembed bench page


def test_stages_of_a_page(bundle: Path) -> None:
    shown = cembed("bench", "page", bundle, "--rounds", "1", "--threads", "1", "--json")
    made = json.loads(shown.out)
    seconds = made["seconds"]
    assert seconds.keys() == {"page", "pixels", "vision", "text", "text_step"}
    assert seconds["page"] >= seconds["pixels"] + seconds["vision"] + seconds["text"]
    assert made["visual tokens"] < made["positions"]
    assert made["peak MiB"] > 50


def test_all_tiles_of_a_page_are_timed(bundle_of: BundleMaker, tmp_path: Path) -> None:
    Image.fromarray(PAGE).save(tmp_path / "page.png")
    bundle = bundle_of("colidefics3")
    made = json.loads(cembed("bench", "page", bundle, tmp_path, "--rounds", "2", "--threads", "1", "--json").out)
    embedder = Embedder.load(bundle)
    embedder.embed_image(PAGE)
    assert made["visual tokens"] == embedder.inputs.tokens_read.read > 16


def test_fewer_visual_tokens_are_timed(bundle: Path) -> None:
    shown = cembed("bench", "page", bundle, "--rounds", "1", "--threads", "1", "--max-visual-tokens", "20", "--json")
    assert json.loads(shown.out)["visual tokens"] <= 20
    assert "visual tokens: " in cembed("bench", "page", bundle, "--rounds", "1", "--threads", "1").out


def test_pages_without_their_blank_paper_are_timed(bundle: Path, tmp_path: Path) -> None:
    page = np.full((280, 280, 3), 255, np.uint8)
    page[100:140, 40:120:4] = 0
    Image.fromarray(page).save(tmp_path / "page.png")
    tokens = [
        json.loads(cembed("bench", "page", bundle, tmp_path, "--rounds", "1", "--json", flag).out)["visual tokens"]
        for flag in ("--skip-blank", "--no-skip-blank")
    ]
    assert tokens[0] < tokens[1]


def test_an_engine_that_is_not_there_is_an_error(bundle: Path) -> None:
    shown = cembed("bench", "page", bundle, "--provider", "fast")
    assert (shown.status, "fast is not in this build" in shown.err) == (1, True)
