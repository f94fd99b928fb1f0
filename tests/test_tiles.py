"""Pages in tiles: pixels as transformers has them, fewer tiles, slots after them, an encoder that has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, BundleMaker, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from libcembed import CallError, Library
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, DynamicCache
from transformers.models.idefics3 import Idefics3Model
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from cembed.export.backbones import load_backbone
from cembed.export.checkpoint import Checkpoint
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.export.tiled import in_buckets
from cembed.export.tokens import prompts_of, read_tokenizer
from cembed.quantize.graph import SourceGraph
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.image_processing import ImageProcessing, Tiles
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.bundle.prompts import Prompter, longest_page
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.embed.inputs import InputBuilder, PageOptions
from cembed.runtime.embed.preprocess import preprocess
from cembed.runtime.embed.tiles import tile_sizes
from cembed.runtime.engines.session import EngineSettings, OrtSession

Json = dict[str, Any]
TILED = ("colidefics3", "colmodernvbert")
HALF = (0.5, 0.5, 0.5)
LATENT = "<|endoftext|>"


def spec_of(side: int, edge: int, patch: int, merge: int, most: int = 1024) -> ImageProcessing:
    tiles, area = Tiles(side, edge, "<{row}.{column}>{image}", "", "{image}", "{image}"), side**2
    return ImageProcessing("tiles", patch, merge, area, most * area, 1 / 255, HALF, (0.4, 0.5, 0.6), tiles=tiles)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8))


def page(name: str = "page") -> Image.Image:
    return Image.open(GOLDEN / "colidefics3" / f"{name}.png")


# Pixels ---------------------------------------------------------------------------------------------------------------

SHAPES = [(1, 900), (300, 300), (301, 300), (1100, 850), (47, 61), (640, 4), (129, 128), (512, 512), (700, 990)]


@pytest.mark.parametrize(
    "edges", [(128, 512, 16, 2), (128, 600, 16, 2), (128, 100, 16, 2), (364, 728, 26, 2), (96, 511, 16, 3)]
)
def test_tiles_are_those_of_transformers(edges: tuple[int, int, int, int]) -> None:
    side, edge, patch, merge = edges
    spec, longest = spec_of(*edges), {"longest_edge": edge}
    theirs = Idefics3ImageProcessorPil(
        size=longest, max_image_size={"longest_edge": side}, image_mean=list(HALF), image_std=[0.4, 0.5, 0.6]
    )
    for height, width in SHAPES:
        given = noise(height, width)
        wanted = theirs(images=given, return_tensors="np", return_row_col_info=True)
        values, grid = preprocess(given, spec)
        across = side // patch // merge
        blocks = wanted["pixel_values"][0].reshape(-1, 3, across, merge, patch, across, merge, patch)
        np.testing.assert_array_equal(values, blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(values.shape))
        rows, columns = wanted["rows"][0][0] or 1, wanted["cols"][0][0] or 1
        assert grid == (rows * side // patch, columns * side // patch)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 9000), width=st.integers(1, 9000), most=st.integers(1, 17))
def test_a_limit_takes_away_tiles(height: int, width: int, most: int) -> None:
    """The largest page in whole steps of a tile that is within the limit."""
    spec = spec_of(128, 512, 16, 4)
    assert spec.tiles is not None
    limited = spec.limited(most * 4 + 3)

    def count(limit: ImageProcessing) -> int:
        assert limit.tiles is not None
        rows, columns = (side // 128 for side in tile_sizes(height, width, limit, limit.tiles)[1])
        return limit.tiles.count(rows, columns)

    assert count(limited) == max(
        n for n in map(count, (spec_of(128, 128 * k, 16, 4) for k in (1, 2, 3, 4))) if n <= most
    )


def test_positions_of_patches_are_those_of_transformers() -> None:
    """Rounding puts patches of some sizes into the bucket before theirs."""
    for side in (2, 3, 7, 8, 14, 26, 27, 32, 49, 64):
        config = AutoConfig.for_model("idefics3").vision_config
        config.image_size, config.patch_size, config.hidden_size = side * 2, 2, 4
        theirs = Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            theirs.patch_embedding.weight.zero_()
            theirs.patch_embedding.bias.zero_()
            rows = theirs(torch.zeros(1, 3, side * 2, side * 2), torch.ones(1, side, side, dtype=torch.bool))[0]
            assert torch.equal(rows, theirs.position_embedding.weight[in_buckets(side).flatten()])


# Settings and configurations ------------------------------------------------------------------------------------------


def changed_copy(name: str, to: Path, file: str, change: Callable[[Json], object]) -> Path:
    root = Path(shutil.copytree(GOLDEN / name, to))
    content: Json = json.loads((root / file).read_text())
    change(content)
    (root / file).write_text(json.dumps(content))
    return root


def told(name: str, root: Path, out: Path, **more: Any) -> str:
    """What an export is refused with, in one line."""
    options = replace(golden(name), model=str(root), **more)
    return refusal(lambda: export(options, out))


GOOD_IMAGES: list[Callable[[Json], object]] = [
    lambda image: image.update(size={"longest_edge": 300}),
    lambda image: image.update(image_mean=0.4, image_std=[0.2, 0.3, 0.4], rescale_factor=1 / 127.5),
    lambda image: image.update(do_pad=False, do_convert_rgb=None, image_processor_type="Idefics3ImageProcessorFast"),
    lambda image: [image.pop(name) for name in ("resample", "do_resize", "do_image_splitting", "image_mean")],
]


@pytest.mark.parametrize("change", GOOD_IMAGES)
def test_image_settings_are_read_as_transformers_does(change: Callable[[Json], object], tmp_path: Path) -> None:
    root = changed_copy("colidefics3", tmp_path / "m", "processor_config.json", lambda c: change(c["image_processor"]))
    image, given = load_backbone("idefics3", root).image, noise(90, 150)
    theirs = Idefics3ImageProcessorPil.from_pretrained(root)(images=given, return_tensors="np")["pixel_values"][0]
    values, _ = preprocess(given, image)
    blocks = theirs.reshape(-1, 3, 4, 2, 16, 4, 2, 16).transpose(0, 2, 5, 3, 6, 1, 4, 7)
    np.testing.assert_allclose(values, blocks.reshape(values.shape), rtol=0, atol=1e-6)


BAD_IMAGES: list[tuple[Json, str]] = [
    ({"resample": 3}, "resample is 3: supported is 1"),
    ({"do_image_splitting": False}, "do_image_splitting is False"),
    ({"do_resize": False}, "do_resize is False"),
    ({"max_image_size": {"longest_edge": 64}}, "longest_edge is 64: supported is 128"),
    ({"max_image_size": None}, "longest_edge is 364: supported is 128"),
    ({"size": {"height": 512, "width": 512}}, "height is 512: supported is longest_edge alone"),
    ({"size": {"longest_edge": 4097}}, "longest_edge is 4097: supported is a whole number from 1 to 4096"),
    ({"size": 512}, "size is 512"),
    ({"image_processor_type": "SmolVLMImageProcessor"}, "SmolVLMImageProcessor"),
    ({"image_std": [0, 1, 1]}, "image_std"),
]


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize(("change", "words"), BAD_IMAGES)
def test_image_settings_that_are_refused(name: str, change: Json, words: str, tmp_path: Path) -> None:
    root = changed_copy(name, tmp_path / "m", "processor_config.json", lambda c: c["image_processor"].update(change))
    assert words in told(name, root, tmp_path / "b")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CembedError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


BAD_CONFIGS: list[tuple[str, Callable[[Json], object], str]] = [
    (
        "colidefics3",
        lambda c: c["text_config"].update(model_type="qwen2"),
        "model_type is 'qwen2'",
    ),
    ("colidefics3", lambda c: c["text_config"].update(attention_bias=True), "attention_bias is True"),
    ("colidefics3", lambda c: c["text_config"].update(mlp_bias=True), "mlp_bias is True"),
    ("colidefics3", lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ("colidefics3", lambda c: c["text_config"].update(head_dim=15), "head_dim"),
    ("colidefics3", lambda c: c["text_config"].update(num_key_value_heads=4), "num_key_value_heads"),
    (
        "colidefics3",
        lambda c: c["text_config"]["rope_parameters"].update(rope_type="linear", factor=2.0),
        "rope_type is 'linear'",
    ),
    ("colidefics3", lambda c: c.update(scale_factor=3), "image_size is 128: supported is an even number"),
    ("colidefics3", lambda c: c["vision_config"].update(patch_size=15), "patch_size"),
    ("colidefics3", lambda c: c["vision_config"].update(hidden_act="relu"), "hidden_act is 'relu'"),
    ("colidefics3", lambda c: c["vision_config"].update(num_channels=4), "num_channels is 4"),
    ("colidefics3", lambda c: c.update(image_token_id=3), "image token 3"),
    ("colmodernvbert", lambda c: c["text_config"].update(model_type="llama"), "model_type is 'llama'"),
    ("colmodernvbert", lambda c: c["text_config"].update(hidden_activation="relu"), "hidden_activation is 'relu'"),
    ("colmodernvbert", lambda c: c["text_config"].update(layer_types=["full_attention"]), "layer_types"),
    ("colmodernvbert", lambda c: c["text_config"].update(layer_types=4 * ["chunked_attention"]), "config.json"),
    ("colmodernvbert", lambda c: c["text_config"].update(num_attention_heads=7), "num_attention_heads is 7"),
    ("colmodernvbert", lambda c: c["text_config"].update(norm_eps=0.0), "norm_eps is 0.0"),
    ("colmodernvbert", lambda c: c["text_config"].update(norm_bias=True), "missing"),
    (
        "colmodernvbert",
        lambda c: c["text_config"]["rope_parameters"]["sliding_attention"].update(rope_type="linear", factor=2.0),
        "rope_type is 'linear'",
    ),
    ("colmodernvbert", lambda c: c.update(pixel_shuffle_factor=3), "image_size is 128"),
    ("colmodernvbert", lambda c: c["vision_config"].update(model_type="clip_vision_model"), "clip_vision_model"),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD_CONFIGS)
def test_configurations_that_are_refused(
    name: str, change: Callable[[Json], object], words: str, tmp_path: Path
) -> None:
    root = changed_copy(name, tmp_path / "m", "config.json", change)
    assert words in told(name, root, tmp_path / "b")


def test_an_encoder_has_no_slots_and_no_mask(tmp_path: Path) -> None:
    rows = {"head": "causal", "latent_token": LATENT}, {"head": "feedback"}, {"prompt_attention": "causal"}
    for more in rows:
        said = told("colmodernvbert", GOLDEN / "colmodernvbert", tmp_path / "b", **more)
        assert "modernvbert is an encoder" in said


def test_what_the_tokenizer_adds_is_part_of_the_prompts(tmp_path: Path) -> None:
    """ModernBERT's puts [CLS] before and [SEP] after every text."""
    root = Path(shutil.copytree(GOLDEN / "colmodernvbert", tmp_path / "m"))
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    bos, end = "<|begin_of_text|>", "<|im_end|>"
    template = TemplateProcessing(
        single=f"{bos} $A {end}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, end)]
    )
    tokenizer.post_processor = template
    tokenizer.save(str(root / "tokenizer.json"))
    backbone, ours = load_backbone("modernvbert", root), read_tokenizer([root])
    _, prompt = prompts_of(backbone, ours, root)
    assert prompt == f"{bos}{{text}}" + 10 * "<end_of_utterance>" + end
    ids = Prompter(ours, backbone.image_token_id).query(prompt, "a question")
    assert ids.tolist() == tokenizer.encode("a question" + 10 * "<end_of_utterance>").ids


@pytest.mark.parametrize("projection", ["linear", "embedding_proj_layer", "custom_text_proj"])
def test_an_adapter_changes_the_projection_by_any_of_its_names(projection: str, tmp_path: Path) -> None:
    """ColSmol's projection is called `linear`, and its adapters change text_model's layers."""
    random = torch.Generator().manual_seed(0)
    names = {"model.text_model.layers.0.self_attn.q_proj": (96, 96), projection: (96, 128)}
    pairs = {
        name: (torch.randn(4, inputs, generator=random), torch.randn(outputs, 4, generator=random))
        for name, (inputs, outputs) in names.items()
    }
    halves = {f"base_model.model.{name}.lora_A.weight": a for name, (a, _) in pairs.items()}
    halves |= {f"base_model.model.{name}.lora_B.weight": b for name, (_, b) in pairs.items()}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    checkpoint = Checkpoint.open(GOLDEN / "colidefics3", tmp_path)
    base = load_file(GOLDEN / "colidefics3" / "model.safetensors")
    changed = {"layers.0.self_attn.q_proj": "model.text_model.layers.0.self_attn.q_proj", "custom_text_proj": "linear"}
    for (ours, theirs), (a, b) in zip(changed.items(), pairs.values(), strict=True):
        torch.testing.assert_close(checkpoint.load(f"{ours}.weight"), base[f"{theirs}.weight"] + 2 * b @ a)


@pytest.mark.parametrize("name", TILED)
def test_the_first_layers_alone(name: str, tmp_path: Path) -> None:
    export(replace(golden(name), num_layers=2), tmp_path / "b")
    weights = SourceGraph(Bundle(tmp_path / "b").graph_path("text")).initializers
    assert {weight.split(".")[1] for weight in weights if weight.startswith("layers.")} == {"0", "1"}


# Fewer tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TILED)
def test_fewer_visual_tokens_are_fewer_tiles(name: str, bundle_of: BundleMaker, tmp_path: Path) -> None:
    """16 tokens a tile; the page is 4 x 3 tiles and a whole one, then 3 x 3, then 2 x 2, then one alone."""
    whole = Embedder.load(bundle_of(name))
    assert whole.manifest.image.max_visual_tokens == 17 * 16
    counts = {}
    for tokens in (272, 160, 159, 80, 79, 16):
        embedder = Embedder.load(bundle_of(name), max_visual_tokens=tokens)
        ids = len(embedder.inputs.document(page()))
        assert len(embedder.embed_image(page())) == ids
        values, _ = preprocess(page().convert("RGB"), embedder.inputs.image)
        counts[tokens] = len(values) // 64
        assert counts[tokens] * 16 <= tokens
    assert list(counts.values()) == [13, 10, 5, 5, 1, 1]
    assert "smallest page takes 16" in refusal(lambda: Embedder.load(bundle_of(name), max_visual_tokens=15))
    assert "the largest 272" in told(name, GOLDEN / name, tmp_path / "b", max_visual_tokens=300)
    assert "the largest 272" in refusal(lambda: Embedder.load(bundle_of(name), max_visual_tokens=273))


def test_the_longest_page_is_counted(bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of("colidefics3"))
    prompt, image = embedder.manifest.document.prompt, embedder.manifest.image
    lengths = [len(embedder.inputs.document(noise(*size))) for size in ((90, 90), (90, 60), (20, 90))]
    assert longest_page(embedder.inputs.prompter, prompt, image) == max(lengths) == lengths[0]


def test_a_page_of_more_positions_than_the_model_has(bundle_of: BundleMaker, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundle_of("colidefics3"), tmp_path / "bundle"))
    raw = json.loads((root / "manifest.json").read_text())
    write_manifest(root, json.dumps(raw | {"max_sequence_length": 200}))
    said = refusal(lambda: Embedder.load(root).embed_image(page()))
    assert said == "the page takes 264 positions in 13 tiles, the model has 200: lower max_visual_tokens"
    assert len(Embedder.load(root, max_visual_tokens=100).embed_image(page())) < 200


@pytest.mark.parametrize("name", TILED)
def test_batch_mates_do_not_matter(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name))
    pages = [page(image) for image in ("page", "wide", "small")]
    for together, alone in zip(embedder.embed_images(pages), pages, strict=True):
        np.testing.assert_array_equal(together, embedder.embed_image(alone))


@pytest.mark.parametrize("name", TILED)
def test_tiles_are_run_one_by_one(name: str, bundle_of: BundleMaker) -> None:
    """What a page takes in memory does not grow with them, and the features are those of all in one run."""
    bundle = Bundle(bundle_of(name))
    session, runs = OrtSession(bundle.graph_path("vision"), EngineSettings()), []

    class Recorded:
        def run(self, feeds: dict[str, Any]) -> Any:
            runs.append((feeds["pixel_values"], session.run(feeds)))
            return runs[-1][1]

    InputBuilder(bundle, PageOptions(), lambda graph: Recorded()).document(page())
    assert [len(tile) for tile, _ in runs] == 13 * [1]
    together = session.run({"pixel_values": np.concatenate([tile for tile, _ in runs])})
    np.testing.assert_array_equal(together, np.concatenate([features for _, features in runs]))


# Other targets and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TILED)
def test_basic_operators_give_the_same_vectors(name: str, tmp_path: Path) -> None:
    export(replace(golden(name), target="onnx", opset=20), tmp_path / "b")
    embedder, expected = Embedder.load(tmp_path / "b"), np.load(GOLDEN / name / "expected.npz")
    for image in ("page", "small"):
        np.testing.assert_allclose(embedder.embed_image(page(image)), expected[f"{image}.vectors"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("weights", ["int8", "w8a8"])
def test_weights_become_integers(name: str, weights: str, bundle_of: BundleMaker, tmp_path: Path) -> None:
    quantise(bundle_of(name), QuantiseOptions(weights, accept_loss=True), tmp_path / "q")
    exact, rounded = (
        Embedder.load(bundle_of(name)).embed_image(page()),
        Embedder.load(tmp_path / "q").embed_image(page()),
    )
    assert (exact * rounded).sum(axis=1).min() > 0.9


# Slots ----------------------------------------------------------------------------------------------------------------


class Llama:
    """The golden Idefics3 in transformers, positions handed to it; the projection is applied here."""

    def __init__(self) -> None:
        root = GOLDEN / "colidefics3"
        state = load_file(root / "model.safetensors")
        self.weight, self.bias = state.pop("linear.weight"), state.pop("linear.bias")
        self.model: Any = Idefics3Model(AutoConfig.from_pretrained(root)).eval()
        self.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=True)
        self.images = Idefics3ImageProcessorPil.from_pretrained(root)

    def embeddings(self, ids: NDArray[np.int64]) -> torch.Tensor:
        found: torch.Tensor = self.model.get_input_embeddings()(torch.from_numpy(ids)[None])
        return found

    def prompt(self, ids: NDArray[np.int64], image: Image.Image | None) -> torch.Tensor:
        embeds = self.embeddings(ids)
        if image is not None:
            pixels = torch.from_numpy(self.images(images=image, return_tensors="np")["pixel_values"])
            features = torch.cat([*self.model.get_image_features(pixels).pooler_output])
            embeds[0, torch.from_numpy(ids == self.model.config.image_token_id)] = features
        return embeds

    @torch.inference_mode()
    def loop(self, ids: NDArray[np.int64], image: Image.Image | None, rows: torch.Tensor | None, slots: int) -> Any:
        """States [1 + slots, dim], normalised: of the prompt's end, then of each slot; None feeds them back."""
        cache, embeds = DynamicCache(config=self.model.config.text_config), self.prompt(ids, image)
        states = [self.step(embeds, 0, cache)]
        for slot in range(slots):
            row = states[-1] if rows is None else rows[slot : slot + 1]
            states.append(self.step(row[None], len(ids) + slot, cache))
        return torch.nn.functional.normalize(torch.cat(states) @ self.weight.T + self.bias, dim=-1).numpy()

    def step(self, embeds: torch.Tensor, first: int, cache: DynamicCache) -> torch.Tensor:
        places = torch.arange(first, first + embeds.shape[1])[None]
        output = self.model.text_model(inputs_embeds=embeds, position_ids=places, past_key_values=cache, use_cache=True)
        last: torch.Tensor = output.last_hidden_state[:, -1]
        return last


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama()


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, random = tmp_path_factory.mktemp("rows") / "rows.safetensors", torch.Generator().manual_seed(3)
    shapes = {"slot_embeddings.document": 64, "slot_embeddings.query": 16}
    save_file({name: torch.randn(rows, 96, generator=random) / 10 for name, rows in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def headed(exported: Callable[[ExportOptions], Path], rows_file: Path) -> Callable[[str], Embedder]:
    """The golden Idefics3 under another head."""

    @cache
    def make(head: str) -> Embedder:
        rows = rows_file if head in ("metaembed", "btoks") else None
        options = replace(golden("colidefics3"), head=head, head_weights=rows, latent_token=LATENT)
        return Embedder.load(exported(options))

    return make


@pytest.mark.parametrize("head", ["causal", "feedback", "metaembed"])
@pytest.mark.parametrize("name", ["wide", "query"])
def test_slots_are_those_of_transformers(
    head: str, name: str, headed: Callable[[str], Embedder], llama: Llama, rows_file: Path
) -> None:
    embedder, image = headed(head), None if name == "query" else page(name).convert("RGB")
    expected = np.load(GOLDEN / "colidefics3" / "expected.npz")
    ids = expected["query1.input_ids" if image is None else f"{name}.input_ids"]
    fed = None
    if head == "causal":
        latent = embedder.manifest.document.latent_token_id
        fed = llama.embeddings(np.full(5, latent))[0].detach()
    if head == "metaembed":
        fed = load_file(rows_file)[f"slot_embeddings.{'query' if image is None else 'document'}"]
    first = head == "metaembed"  # its vectors are those of the slots
    wanted = llama.loop(ids, image, fed, 5)[first:]
    budget = Budget(len(wanted))
    found = embedder.embed_query("source code form", budget) if image is None else embedder.embed_image(image, budget)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    looped = Budget(len(wanted), decode="loop")
    found = embedder.embed_query("source code form", looped) if image is None else embedder.embed_image(image, looped)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_states_grow_and_go_on_from_a_file(headed: Callable[[str], Embedder], tmp_path: Path) -> None:
    embedder = headed("causal")
    state = embedder.start(page())
    few = state.extend(3)
    state.save(tmp_path / "state")
    at_once = embedder.embed_image(page(), Budget(9, decode="loop"))
    np.testing.assert_array_equal(few, at_once[:3])
    np.testing.assert_array_equal(state.extend(9), at_once)
    np.testing.assert_array_equal(embedder.resume(tmp_path / "state").extend(9), at_once)
    alone = embedder.embed_image(page("small"))
    np.testing.assert_array_equal(embedder.embed_images([page(), page("small")])[1], alone)


def test_pooled_slots_are_the_mean_of_their_states(headed: Callable[[str], Embedder]) -> None:
    """The projection's states, before they are normalised: so the mean of unit vectors is only near."""
    pooled, whole = headed("btoks").embed_image(page("wide")), headed("metaembed").embed_image(page("wide"))
    assert pooled.shape == (1, 128)
    assert float(pooled[0] @ whole.mean(axis=0) / np.linalg.norm(whole.mean(axis=0))) > 0.99


# The C library --------------------------------------------------------------------------------------------------------


def test_libcembed_cuts_the_same_tiles(library: Library, headed: Callable[[str], Embedder], tmp_path: Path) -> None:
    """Fewer tiles, slots after them, in one pass and one by one; and a page that is longer than the model's context."""
    root, picture = headed("causal").bundle.root, page().convert("RGB")
    for tokens in (80, 16):
        embedder, bundle = Embedder.load(root, max_visual_tokens=tokens), library.open(root, max_visual_tokens=tokens)
        for loop, budget in ((0, Budget()), (1, Budget(decode="loop"))):
            found, expected = bundle.embed_image(picture, loop=loop), embedder.embed_image(picture, budget)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        bundle.close()
    short = Path(shutil.copytree(root, tmp_path / "short"))
    content = json.loads((short / "manifest.json").read_text())
    write_manifest(short, json.dumps(content | {"max_sequence_length": 100}))
    with pytest.raises(CallError, match="positions in 13 tiles, the model has 100: lower max_visual_tokens"):
        library.open(short).embed_image(picture)
