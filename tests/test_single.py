"""The head of one vector: the state of the last position, after the prompts of the models that are trained so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import libcembed
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from preparation import pillows_pixels
from reference import HIDDEN, Model, Reference, Zoo

from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder, maxsim

PAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8))
TEXT = "source code form of the work"


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen3-vl"])
def model(request: pytest.FixtureRequest, zoo: Zoo, exported: Callable[[ExportOptions], Path]) -> Model:
    root = zoo.checkpoint(request.param)
    bundle = exported(ExportOptions(model=str(root), head="single"))
    return Model(bundle, Embedder.load(bundle, threads=1), Reference(root), {})


def expected(model: Model, prompt: tuple[torch.Tensor, NDArray[np.int64]]) -> NDArray[np.float32]:
    states = model.reference.single_pass(*prompt, torch.empty(0, HIDDEN), "continue")
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(states[-1:], dim=-1).numpy()
    return vectors


def test_the_state_of_the_last_position(model: Model) -> None:
    (page,), (query,) = model.embedder.embed_images([PAGE]), model.embedder.embed_queries([TEXT])
    np.testing.assert_allclose(page, expected(model, model.document(PAGE)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(query, expected(model, model.query(TEXT)), rtol=0, atol=1e-5)
    assert page.shape == query.shape == (1, model.embedder.dim)
    np.testing.assert_allclose(maxsim([query], [page]), query @ page.T, atol=1e-6)


def test_the_prompts(model: Model) -> None:
    """A chat of a system, a user and an assistant who is about to speak."""
    for prompt in (model.embedder.manifest.document.prompt, model.embedder.manifest.query.prompt):
        roles = [part.split("\n")[0] for part in prompt.split("<|im_start|>")[1:]]
        assert roles == ["system", "user", "assistant"]
    assert model.embedder.manifest.document.prompt.count("<|vision_start|>{image}<|vision_end|>") == 1


@pillows_pixels
def test_the_c_library(library: libcembed.Library, model: Model) -> None:
    opened = library.open(model.bundle)
    for vectors, right in (
        (opened.embed_image(PAGE), model.embedder.embed_images([PAGE])[0]),
        (opened.embed_query(TEXT), model.embedder.embed_queries([TEXT])[0]),
    ):
        np.testing.assert_allclose(vectors, right, rtol=0, atol=1e-6)
    opened.close()


def test_there_is_no_loop(model: Model) -> None:
    with pytest.raises(CembedError, match="no budget and no loop"):
        model.embedder.embed_images([PAGE], decode="loop")
