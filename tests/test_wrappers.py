"""transformers' own retrieval classes: exported, and compared with what they and their processors make of an input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, once
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.colmodernvbert import ColModernVBertConfig, ColModernVBertForRetrieval, ColModernVBertProcessor
from transformers.models.colpali import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor
from transformers.models.colqwen2 import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cembed.export.backbones import load_backbone
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.prompts import page_prompt
from cembed.runtime.embed.preprocess import preprocess

DIM = 24
TEXTS = ("source code form of the work", "x")
PAGE = Image.open(GOLDEN / "colqwen2" / "wide.png").convert("RGB")
Exported = Callable[[ExportOptions], Path]


@dataclass(frozen=True)
class Kind:
    """A wrapper's classes."""

    config: Any
    model: Any
    processor: Any
    images: Any
    backbone: str


QWEN = (ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2VLImageProcessorPil)
KINDS = {
    "colpali": Kind(ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor, SiglipImageProcessorPil, "paligemma"),
    "colqwen2": Kind(*QWEN, "qwen2-vl"),
    "colqwen2_5": Kind(*QWEN, "qwen2.5-vl"),
    "colmodernvbert": Kind(
        ColModernVBertConfig,
        ColModernVBertForRetrieval,
        ColModernVBertProcessor,
        Idefics3ImageProcessorPil,
        "modernvbert",
    ),
}
"""By the golden folder whose configuration, tokenizer and image settings they get."""


def save(root: Path, name: str) -> None:
    """A wrapper around a model like the golden one, as transformers saves it; its processor adds nothing to the
    tokenizer, whose numbers the small model would have no rows for."""
    kind, vlm = KINDS[name], json.loads((GOLDEN / name / "config.json").read_text())
    torch.manual_seed(0)
    kind.model(kind.config(vlm_config=vlm, embedding_dim=DIM)).save_pretrained(root)
    processor_of(name).save_pretrained(root)
    for path in (GOLDEN / name).glob("tokenizer*"):
        shutil.copy(path, root)


def processor_of(name: str) -> Any:
    images, tokenizer = KINDS[name].images.from_pretrained(GOLDEN / name), AutoTokenizer.from_pretrained(GOLDEN / name)
    row = {"image_seq_len": 16} if name == "colmodernvbert" else {}
    return KINDS[name].processor(images, tokenizer, **row)


@pytest.fixture(scope="module")
def made(shared: Callable[[str], Path]) -> Callable[[str], Path]:
    return lambda name: once(shared("wrappers") / name, lambda root: save(root, name))


@pytest.fixture
def changed(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a wrapper with other fields in a file of settings."""

    def change(name: str, file: str = "config.json", **fields: object) -> Path:
        root = Path(shutil.copytree(made(name), tmp_path / "model"))
        settings = json.loads((root / file).read_text()) | fields
        (root / file).write_text(json.dumps(settings))
        return root

    return change


@pytest.mark.parametrize("name", KINDS)
def test_vectors_and_tokens_are_those_of_the_class(name: str, made: Callable[[str], Path], exported: Exported) -> None:
    root = made(name)
    embedder, processor = Embedder.load(exported(ExportOptions(model=str(root))), threads=1), processor_of(name)
    model = KINDS[name].model.from_pretrained(root).eval()
    manifest, prompter = embedder.manifest, embedder.inputs.prompter
    assert (manifest.backbone, manifest.head, manifest.dim) == (KINDS[name].backbone, "colbert", DIM)
    page = processor.process_images([PAGE])
    patches, grid = preprocess(PAGE, manifest.image)
    tokens = (manifest.image.input_patches or len(patches)) // manifest.image.merge_size**2
    ids = prompter.document(page_prompt(manifest.document.prompt, manifest.image, grid), tokens)
    np.testing.assert_array_equal(ids, page["input_ids"][0])
    with torch.inference_mode():
        expected = model(**page).embeddings[0].numpy()
    np.testing.assert_allclose(embedder.embed_image(PAGE), expected, rtol=0, atol=1e-5)
    for text in TEXTS:
        query = processor.process_queries([text])
        np.testing.assert_array_equal(prompter.query(manifest.query.prompt, text), query["input_ids"][0])
        with torch.inference_mode():
            expected = model(**query).embeddings[0].numpy()
        np.testing.assert_allclose(embedder.embed_query(text), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("version", "axes", "end"), [("4.57.3", 3, ""), ("5.2.0", 1, ""), ("5.15.0.dev0", 1, "\n")])
def test_conventions_are_those_of_the_version_that_saved_it(
    changed: Callable[..., Path], version: str, axes: int, end: str
) -> None:
    """From 5.2 on ColQwen2ForRetrieval tells its model nothing of a page's rows and columns."""
    backbone = load_backbone(None, changed("colqwen2", transformers_version=version))
    assert backbone.positions.axes == axes
    assert backbone.prompts[1] == "Query: {text}" + 10 * "<|endoftext|>" + end


def test_positions_of_rows_and_columns(changed: Callable[..., Path], tmp_path: Path) -> None:
    root = changed("colqwen2", transformers_version="4.57.3")
    export(ExportOptions(model=str(root)), tmp_path / "bundle")
    page, model = processor_of("colqwen2").process_images([PAGE]), ColQwen2ForRetrieval.from_pretrained(root).eval()
    ids, grid = page["input_ids"], page["image_grid_thw"]
    is_image = (ids == model.config.vlm_config.image_token_id).int()
    with torch.inference_mode():
        positions, _ = model.vlm.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=is_image)
        expected = model(**page, position_ids=positions).embeddings[0].numpy()
    actual = Embedder.load(tmp_path / "bundle", threads=1).embed_image(PAGE)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_prompts_are_those_of_the_processor(changed: Callable[..., Path]) -> None:
    root = changed("colpali", "processor_config.json", visual_prompt_prefix="Look.", query_prefix="Ask: ")
    roles = json.loads((root / "tokenizer_config.json").read_text())
    (root / "tokenizer_config.json").write_text(json.dumps(roles | {"pad_token": {"content": "<eos>"}}))
    assert load_backbone(None, root).prompts == ("{image}<bos>Look.\n", f"<bos>Ask: {{text}}{10 * '<eos>'}\n")
    (root / "processor_config.json").rename(root / "preprocessor_config.json")
    shutil.copy(GOLDEN / "colpali" / "preprocessor_config.json", root)
    assert load_backbone(None, root).prompts[0] == "{image}<bos>Describe the image.\n"


@pytest.mark.parametrize(
    ("name", "file", "fields", "words"),
    [
        ("colqwen2", "config.json", {"model_type": "colother"}, "is a colother wrapper, and cembed has colpali, "),
        ("colqwen2", "config.json", {"vlm_config": None}, "vlm_config is None: supported is an object"),
        (
            "colqwen2",
            "config.json",
            {"vlm_config": {"model_type": "llava"}},
            "is a llava checkpoint, and cembed has qwen2-vl",
        ),
        (
            "colqwen2",
            "config.json",
            {"vlm_config": {"model_type": "qwen3_vl"}},
            "is a colqwen2 wrapper around a qwen3-vl",
        ),
        ("colqwen2", "config.json", {"embedding_dim": "x"}, "embedding_dim is 'x'"),
        ("colqwen2", "config.json", {"embedding_dim": 32}, "custom_text_proj.weight has shape (24, 96): config.json"),
        ("colqwen2", "processor_config.json", {"visual_prompt_prefix": "no page"}, "one <|image_pad|> is needed"),
        ("colqwen2", "processor_config.json", {"visual_prompt_prefix": 3}, "visual_prompt_prefix is 3"),
        ("colqwen2", "tokenizer_config.json", {"pad_token": None}, "pad_token is None: supported is a text"),
        ("colpali", "tokenizer_config.json", {"bos_token": None}, "bos_token is None: supported is a text"),
    ],
)
def test_what_is_odd_is_named(
    changed: Callable[..., Path], tmp_path: Path, name: str, file: str, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(CembedError) as raised:
        export(ExportOptions(model=str(changed(name, file, **fields))), tmp_path / "out")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrapper_needs_its_projection(changed: Callable[..., Path], tmp_path: Path) -> None:
    root = changed("colqwen2")
    weights = load_file(root / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "proj_layer" not in name}, root / "model.safetensors")
    with pytest.raises(CembedError, match=r"custom_text_proj\.weight is missing: config\.json has embedding_dim 24"):
        export(ExportOptions(model=str(root)), tmp_path / "out")
