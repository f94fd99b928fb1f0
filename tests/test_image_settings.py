"""Images are prepared as transformers does from the same folder; an adapter's settings go before the base's."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKBONE_OF, GOLDEN
from mutations import mutations
from numpy.typing import NDArray
from PIL import Image

from cembed.export.backbones import load_backbone
from cembed.runtime import CembedError
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.embed.preprocess import preprocess

NESTED, LEGACY = "processor_config.json", "preprocessor_config.json"
RANDOM = np.random.default_rng(0)
PAGES = [Image.fromarray(RANDOM.integers(0, 256, (*size, 3), np.uint8)) for size in ((90, 150), (400, 500))]
Json = dict[str, Any]


def copy(name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / name, to)
    return to


def settings(name: str) -> Json:
    content: Json = json.loads((GOLDEN / name / LEGACY).read_text())
    return content


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def without(content: Json, *names: str, **more: Any) -> Json:
    return {name: value for name, value in content.items() if name not in names} | more


def transformers_patches(root: Path, page: Image.Image, patch: int = 14) -> NDArray[np.float32]:
    """Pixels [patches, 3 * patch**2] as transformers gives them, the first of the two frames."""
    from transformers import AutoImageProcessor

    values = np.asarray(AutoImageProcessor.from_pretrained(root, backend="pil")(images=page)["pixel_values"])
    if values.ndim == 2:
        return values.reshape(len(values), 3, 2, patch**2)[:, :, 0].reshape(len(values), -1)
    rows, columns = (side // patch for side in values.shape[-2:])
    blocks = values[0].reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
    return blocks.reshape(rows * columns, -1)


def image_of(root: Path, name: str, adapter: Path | None = None) -> ImageProcessing:
    return load_backbone(BACKBONE_OF[name], root, adapter).image


def agree(image: ImageProcessing, processor: Path) -> None:
    for page in PAGES:
        np.testing.assert_allclose(preprocess(page, image)[0], transformers_patches(processor, page), atol=1e-6)


LIMITS = ("min_pixels", "max_pixels")
QWEN, SIGLIP = settings("colqwen2"), settings("colpali")
AREAS = {"shortest_edge": 3136, "longest_edge": 40_000}
GOOD: dict[str, tuple[str, Json]] = {
    "as saved": ("colqwen2", QWEN),
    "limits in size": ("colqwen2", without(QWEN, *LIMITS)),
    "limits beside size": ("colqwen2", without(QWEN, "size")),
    "no limits": ("colqwen2", without(QWEN, "size", *LIMITS)),
    "no lower limit": ("colqwen2", without(QWEN, "size", "min_pixels")),
    "no upper limit": ("colqwen2", without(QWEN, "size", "max_pixels", min_pixels=5000)),
    "null limits": ("colqwen2", QWEN | {"min_pixels": None, "max_pixels": None}),
    "no size": ("colqwen2", QWEN | {"size": None}),
    "no size, no limits": ("colqwen2", without(QWEN, *LIMITS, size=None)),
    "limits before size": ("colqwen2", QWEN | {"size": AREAS}),
    "limits in the oldest style": ("colqwen2", QWEN | {"size": {"min_pixels": 4000, "max_pixels": 9999}}),
    "one limit in size": ("colqwen2", without(QWEN, "max_pixels", size={"longest_edge": 40_000})),
    "limits as floats": ("colqwen2", QWEN | {"max_pixels": 40_000.0}),
    "nothing at all": ("colqwen2", {}),
    "one mean": ("colqwen2", QWEN | {"image_mean": 0.5}),
    "one deviation": ("colqwen2", QWEN | {"image_std": 0.25}),
    "no mean": ("colqwen2", without(QWEN, "image_mean", "image_std", "rescale_factor", "resample")),
    "another scale": ("colqwen2", QWEN | {"rescale_factor": 1 / 127.5}),
    "no patches": ("colqwen2", without(QWEN, "patch_size", "merge_size", "temporal_patch_size")),
    "fast": ("colqwen2", QWEN | {"image_processor_type": "Qwen2VLImageProcessorFast"}),
    "a crop that is not used": ("colqwen2", QWEN | {"do_center_crop": True, "crop_size": 50}),
    "SigLIP": ("colpali", SIGLIP),
    "SigLIP, fast": ("colpali", SIGLIP | {"image_processor_type": "SiglipImageProcessorFast"}),
    "SigLIP, a list": ("colpali", SIGLIP | {"size": [112, 112]}),
    "SigLIP, size only": ("colpali", {"size": {"height": 112, "width": 112}}),
    "SigLIP, as fast ones are saved": ("colpali", SIGLIP | {"do_center_crop": None, "do_pad": None, "crop_size": None}),
    "SigLIP, one mean": ("colpali", SIGLIP | {"image_mean": 0.4, "image_std": 0.3}),
}
BAD: dict[str, tuple[str, Json, str]] = {
    "one limit only": ("colqwen2", without(QWEN, *LIMITS, size={"shortest_edge": 3136}), "longest_edge is missing"),
    "limits inside": ("colqwen2", without(QWEN, *LIMITS, size={"min_pixels": 1, "max_pixels": 2}), "max_pixels is 2"),
    "height and width": ("colqwen2", QWEN | {"size": {"height": 3, "width": 3}}, "height is 3"),
    "one side": ("colqwen2", without(QWEN, *LIMITS, size=560), "size is 560"),
    "texts": ("colqwen2", QWEN | {"max_pixels": "75264"}, "longest_edge is '75264'"),
    "crossed limits": ("colqwen2", QWEN | {"min_pixels": 80_000}, "from shortest_edge, 80000"),
    "another patch": ("colqwen2", QWEN | {"patch_size": 16}, "patch_size is 16: supported is 14"),
    "another merge": ("colqwen2", QWEN | {"merge_size": 1}, "merge_size is 1: supported is 2"),
    "one frame": ("colqwen2", QWEN | {"temporal_patch_size": 1}, "temporal_patch_size is 1"),
    "another filter": ("colqwen2", QWEN | {"resample": 2}, "resample is 2"),
    "not resized": ("colqwen2", QWEN | {"do_resize": False}, "do_resize is False"),
    "no deviation": ("colqwen2", QWEN | {"image_std": [1, 0, 1]}, "image_std"),
    "four means": ("colqwen2", QWEN | {"image_mean": [1, 1, 1, 1]}, "three numbers, or one"),
    "another processor": ("colqwen2", QWEN | {"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
    "SigLIP, another size": (
        "colpali",
        SIGLIP | {"size": {"height": 448, "width": 448}},
        "height is 448: supported is 112",
    ),
    "SigLIP, no size": ("colpali", without(SIGLIP, "size"), "height is 224: supported is 112"),
    "SigLIP, one side": ("colpali", SIGLIP | {"size": 112}, "size is 112"),
    "SigLIP, cropped": ("colpali", SIGLIP | {"do_center_crop": True, "crop_size": 50}, "do_center_crop"),
    "SigLIP, filled up": ("colpali", SIGLIP | {"do_pad": True}, "do_pad"),
    "SigLIP, other tokens": (
        "colpali",
        SIGLIP | {"image_seq_length": 1024},
        "image_seq_length is 1024: supported is 64",
    ),
}


@pytest.mark.parametrize(("name", "content"), GOOD.values(), ids=GOOD)
def test_settings_of_every_style(tmp_path: Path, name: str, content: Json) -> None:
    root = copy(name, tmp_path / "model")
    write(root / LEGACY, content)
    agree(image_of(root, name), root)


@pytest.mark.parametrize(("name", "content", "words"), BAD.values(), ids=BAD)
def test_settings_that_are_refused(tmp_path: Path, name: str, content: Json, words: str) -> None:
    root = copy(name, tmp_path / "model")
    write(root / LEGACY, content)
    with pytest.raises(CembedError) as raised:
        image_of(root, name)
    assert words in str(raised.value)
    assert LEGACY in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["colqwen2", "colpali"])
def test_what_is_accepted_is_what_transformers_does(tmp_path: Path, name: str) -> None:
    root, accepted = copy(name, tmp_path / "model"), 0
    for change, content in mutations(settings(name)):
        (root / LEGACY).write_text(content)
        try:
            image = image_of(root, name)
        except CembedError:
            continue
        accepted += 1
        ours, theirs = preprocess(PAGES[0], image)[0], transformers_patches(root, PAGES[0])
        assert ours.shape == theirs.shape, change
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=change)
    assert accepted > 40


OTHER = without(QWEN, max_pixels=30_000)


@pytest.mark.parametrize(("nested", "pixels"), [(OTHER, 30_000), ({}, 1_003_520)])
def test_the_processor_goes_before_the_image_processor(tmp_path: Path, nested: Json, pixels: int) -> None:
    root = copy("colqwen2", tmp_path / "model")
    write(root / NESTED, {"image_processor": nested, "processor_class": "Qwen2VLProcessor"})
    with pytest.warns(RuntimeWarning) as caught:
        image = image_of(root, "colqwen2")
    agree(image, root)
    (said,) = [str(warning.message) for warning in caught]
    assert f"{NESTED}: image_processor says, not {root / LEGACY}: " in said
    assert f"max_pixels {pixels}, not 75264" in said


@pytest.mark.parametrize("content", [{}, {"image_processor": None}, {"processor_class": "Qwen2VLProcessor"}])
def test_a_processor_that_says_nothing_of_images(tmp_path: Path, content: Json) -> None:
    root = copy("colqwen2", tmp_path / "model")
    write(root / NESTED, content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(image_of(root, "colqwen2"), root)


def test_one_file_is_enough(tmp_path: Path) -> None:
    root = copy("colqwen2", tmp_path / "model")
    (root / LEGACY).unlink()
    with pytest.raises(CembedError, match=f"{LEGACY} is missing"):
        image_of(root, "colqwen2")
    write(root / NESTED, {"image_processor": OTHER})
    agree(image_of(root, "colqwen2"), root)


@pytest.mark.parametrize("file", [NESTED, LEGACY])
def test_an_adapter_is_trained_with_settings_of_its_own(tmp_path: Path, file: str) -> None:
    root, adapter = copy("colqwen2", tmp_path / "base"), tmp_path / "adapter"
    write(root / LEGACY, QWEN | {"max_pixels": 12_845_056})
    write(adapter / file, {"image_processor": OTHER} if file == NESTED else OTHER)
    with pytest.warns(RuntimeWarning) as caught:
        image = image_of(root, "colqwen2", adapter)
    agree(image, adapter)
    (said,) = [str(warning.message) for warning in caught]
    assert f"images are prepared as {adapter / file}" in said
    assert f"not {root / LEGACY}: max_pixels 30000, not 12845056" in said
    assert "\n" not in said


def test_an_adapter_without_settings_has_those_of_its_base(tmp_path: Path) -> None:
    root, adapter = copy("colqwen2", tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_of(root, "colqwen2", adapter) == image_of(root, "colqwen2")
        write(adapter / LEGACY, QWEN)
        assert image_of(root, "colqwen2", adapter) == image_of(root, "colqwen2")


def test_settings_that_do_not_count_may_be_odd(tmp_path: Path) -> None:
    root, adapter = copy("colqwen2", tmp_path / "base"), tmp_path / "adapter"
    write(root / LEGACY, QWEN | {"resample": 2})
    write(adapter / LEGACY, OTHER)
    with pytest.warns(RuntimeWarning, match="resample is 2: supported is 3"):
        agree(image_of(root, "colqwen2", adapter), adapter)


NO_SETTINGS = [b"", b"{", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("content", NO_SETTINGS)
@pytest.mark.parametrize("file", [NESTED, LEGACY])
def test_files_that_are_no_settings(tmp_path: Path, file: str, content: bytes) -> None:
    root = copy("colqwen2", tmp_path / "model")
    (root / file).write_bytes(content)
    with pytest.raises(CembedError, match=file) as raised:
        image_of(root, "colqwen2")
    assert "\n" not in str(raised.value)
