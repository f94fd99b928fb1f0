"""The whole pipeline, from PNG and text to vectors, against what the reference implementation returned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import BACKBONE_OF, CAUSAL, GOLDEN, BundleMaker
from numpy.typing import NDArray
from PIL import Image

from cembed.export.choices import BACKBONES
from cembed.runtime import Embedder
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.prompts import page_prompt
from cembed.runtime.embed.preprocess import preprocess, resized_size

IMAGES = ("page", "wide", "small")
TORCHVISION = ("colqwen3", "colqwen3_5")
TOLERANCE = {"colqwen3_5": 2e-4}  # its own float32 differs from float64 by 4e-5


def test_every_backbone_has_a_golden_checkpoint() -> None:
    assert set(BACKBONE_OF.values()) == set(BACKBONES)


def still_frame(pixel_values: NDArray[np.float32], spec: ImageProcessing) -> NDArray[np.float32]:
    """Reference pixels as ours are: patches, and only the first of the two equal frames."""
    if spec.resize == "fixed":
        (image,) = pixel_values  # channel, height, width
        side = image.shape[1] // spec.patch_size
        blocks = image.reshape(3, side, spec.patch_size, side, spec.patch_size)
        return blocks.transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    if spec.tiles is not None:
        side, factor, merge = spec.tiles.side, spec.factor, spec.merge_size
        blocks = pixel_values.reshape(
            -1, 3, side // factor, merge, spec.patch_size, side // factor, merge, spec.patch_size
        )
        return blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * spec.patch_size**2)
    frames = pixel_values.reshape(len(pixel_values), 3, 2, -1)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 1])
    return frames[:, :, 0].reshape(len(pixel_values), -1)


def page(name: str, key: str, spec: ImageProcessing) -> Image.Image:
    """A golden page; where the reference resized with torchvision, in the size that it will have.

    That rounds its own way: one level more or less in 4 of 1,000 numbers, which is up to 6e-3 in a vector.
    """
    image = Image.open(GOLDEN / name / f"{key}.png")
    if name not in TORCHVISION:
        return image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    size = resized_size(image.height, image.width, spec)
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_equals_the_reference(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name))
    expected = np.load(GOLDEN / name / "expected.npz")
    queries = json.loads((GOLDEN / name / "queries.json").read_text())
    images = [page(name, image, embedder.manifest.image) for image in IMAGES]
    pages = embedder.embed_images(images)
    vectors = dict(zip(IMAGES, pages, strict=True))
    vectors |= {f"query{i}": v for i, v in enumerate(embedder.embed_queries(queries))}
    assert len(vectors) == 6
    for key, actual in vectors.items():
        np.testing.assert_allclose(
            actual, expected[f"{key}.vectors"], rtol=0, atol=TOLERANCE.get(name, 1e-4), err_msg=key
        )


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_inputs_equal_the_reference(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name))
    expected = np.load(GOLDEN / name / "expected.npz")
    manifest = embedder.manifest
    compared = 0
    for key in IMAGES:
        image = page(name, key, manifest.image).convert("RGB")
        pixel_values, grid = preprocess(image, manifest.image)
        prompt = page_prompt(manifest.document.prompt, manifest.image, grid)
        patches = manifest.image.input_patches or len(pixel_values)
        ids = embedder.inputs.prompter.document(prompt, patches // manifest.image.merge_size**2)
        np.testing.assert_array_equal(ids, expected[f"{key}.input_ids"])
        if f"{key}.pixel_values" in expected:
            reference = still_frame(expected[f"{key}.pixel_values"], manifest.image)
            np.testing.assert_allclose(pixel_values, reference, rtol=0, atol=1e-6)
            compared += 1
    assert compared >= 1
    for i, text in enumerate(json.loads((GOLDEN / name / "queries.json").read_text())):
        ids = embedder.inputs.prompter.query(manifest.query.prompt, text)
        np.testing.assert_array_equal(ids, expected[f"query{i}.input_ids"])


@pytest.mark.parametrize("name", CAUSAL)
def test_single_pass_equals_the_loop_over_a_cache(name: str, bundle_of: BundleMaker) -> None:
    from reference import Reference

    embedder = Embedder.load(bundle_of(name))
    manifest, reference = embedder.manifest, Reference(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    latent = manifest.document.latent_token_id
    assert latent is not None
    policy = manifest.document.slot_positions
    for key in ("wide", "small"):
        grid = (8, 8) if manifest.backbone == "paligemma" else tuple(expected[f"{key}.grid_thw"][1:])
        image = (expected[f"{key}.pixel_values"], grid)
        loop = reference.loop(expected[f"{key}.input_ids"], image, latent, 8, policy)
        single = embedder.embed_image(Image.open(GOLDEN / name / f"{key}.png"))
        np.testing.assert_allclose(single, loop, rtol=0, atol=1e-5)
    text = "source code form"
    ids = embedder.inputs.prompter.query(manifest.query.prompt, text)
    loop = reference.loop(ids, None, latent, 4, policy)
    np.testing.assert_allclose(embedder.embed_query(text), loop, rtol=0, atol=1e-5)
