"""Latent slots on the models of transformers: one at a time over a cache, or all in one pass without one.

Positions and masks are handed to transformers, never taken from it. Weights are renamed here, independently of the
exporter, and loaded strictly. `Zoo` makes the tiny checkpoints, and the bundles, that are compared with them.

Letters: A position axes, S positions of the prompt, H hidden.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache
from transformers.models.gemma import GemmaModel
from transformers.models.paligemma import PaliGemmaModel
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_5 import Qwen3_5Model
from transformers.models.qwen3_vl import Qwen3VLModel

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.runtime import Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Positions, Side, SlotPositions
from cembed.runtime.embed.positions import prompt_positions, slot_positions
from cembed.runtime.embed.preprocess import preprocess
from cembed.runtime.engines.session import EngineSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
from random_checkpoint import make_checkpoint

torch.set_num_threads(1)  # more cost more than they save in models as small as these

MODELS = {
    "qwen2_vl": Qwen2VLModel,
    "qwen2_5_vl": Qwen2_5_VLModel,
    "qwen3_vl": Qwen3VLModel,
    "qwen3_5": Qwen3_5Model,
    "paligemma": PaliGemmaModel,
}
PREFIXES = (
    ("model.language_model.model.", "language_model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.", "language_model."),
    ("visual.", "visual."),
    ("model.", "language_model."),
)


GOLDEN = Path(__file__).parent / "golden"
HEAD = ("custom_text_proj", "slot_embeddings")
Image2D = tuple[NDArray[np.float32], tuple[int, int]]
"""Pixel values as transformers wants them, and the grid of patches."""


def renamed(key: str) -> str:
    return next(new + key.removeprefix(old) for old, new in PREFIXES if key.startswith(old))


class Reference:
    def __init__(self, folder: Path, num_layers: int | None = None) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.model: Any = MODELS[self.config.model_type](self.config).eval()
        state = {
            key: value for key, value in load_file(folder / "model.safetensors").items() if not key.startswith(HEAD)
        }
        self.model.load_state_dict({renamed(key): value for key, value in state.items()}, strict=True)
        self.gemma = isinstance(self.model.language_model, GemmaModel)
        self.scale = math.sqrt(self.config.text_config.hidden_size) if self.gemma else 1.0
        self.model.language_model.layers = self.model.language_model.layers[:num_layers]
        self.hidden = self.config.text_config.hidden_size
        self.deepstack = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    def embeddings(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return self.model.language_model.embed_tokens(torch.from_numpy(ids)[None])

    def image_features(self, pixel_values: NDArray[np.float32], grid: tuple[int, int]) -> torch.Tensor:
        """Features [V, H] of one image; Qwen: pixel_values [P, 1176], PaliGemma: [1, 3, side, side]."""
        pixels = torch.from_numpy(pixel_values)
        if self.gemma:
            return self.model.get_image_features(pixels).pooler_output[0]
        given = self.model.get_image_features(pixels, torch.tensor([[1, *grid]]))
        if not self.deepstack:
            return given.pooler_output[0]
        return torch.cat([given.pooler_output[0], *(layer[0] for layer in given.deepstack_features)], dim=-1)

    def wide(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows with zeros behind them, where images have what the first layers take: [.., (1 + deepstack) * H]."""
        return torch.nn.functional.pad(rows, (0, self.hidden * (1 + self.deepstack) - rows.shape[-1]))

    def run(self, embeds: torch.Tensor, **fields: Any) -> torch.Tensor:
        """Last hidden states [1, S, H] of wide rows [1, S, ..]."""
        rows, *layers = embeds.split(self.hidden, dim=-1)
        if layers:
            fields["visual_pos_masks"] = torch.ones(rows.shape[:2], dtype=torch.bool)
            fields["deepstack_visual_embeds"] = [layer.flatten(0, 1) for layer in layers]
        return self.model.language_model(inputs_embeds=rows, **fields).last_hidden_state

    @torch.inference_mode()
    def prompt(self, ids: NDArray[np.int64], image: Image2D | None) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """What the decoder is fed, wide rows [1, S, ..], and where, [A, S]."""
        is_image = ids == getattr(self.config, "image_token_id", getattr(self.config, "image_token_index", None))
        embeds = self.wide(self.embeddings(ids))
        if image is not None:
            embeds[0, torch.from_numpy(is_image)] = self.image_features(*image)
        spec = Positions(axes=1, first=1) if self.gemma else Positions(axes=3, first=0)
        return embeds, prompt_positions(is_image, image[1] if image else None, spec, 2)

    @torch.inference_mode()
    def single_pass(
        self,
        embeds: torch.Tensor,
        positions: NDArray[np.int64],
        rows: torch.Tensor,
        policy: SlotPositions,
    ) -> torch.Tensor:
        """Last hidden states [S + slots, H] of prompt and `rows` [slots, H], without a cache."""
        length, total = embeds.shape[1], embeds.shape[1] + len(rows)
        behind = positions.max() + 1 + np.arange(len(rows)) if policy == "continue" else np.zeros(len(rows), np.int64)
        positions = np.concatenate([positions, np.tile(behind, (len(positions), 1))], axis=1)
        mask = torch.full((total, total), torch.finfo(torch.float32).min).triu(1)
        if self.gemma:
            mask[:length, :length] = 0
        return self.run(
            torch.cat([embeds, self.wide(rows[None])], dim=1),
            position_ids=torch.from_numpy(positions if self.gemma else positions[:, None]),
            attention_mask=mask[None, None],
            use_cache=False,
        )[0]

    @torch.inference_mode()
    def feedback(
        self, embeds: torch.Tensor, positions: NDArray[np.int64], num_vectors: int, policy: SlotPositions
    ) -> torch.Tensor:
        """Last hidden states [num_vectors, H]: of the prompt's end, then of slots that are fed the one before."""
        cache = DynamicCache(config=self.model.language_model.config)
        states = [self.step(embeds, positions, cache)]
        for k in range(num_vectors - 1):
            place = int(positions.max()) + 1 + k if policy == "continue" else 0
            states.append(self.step(states[-1][None], np.full((len(positions), 1), place), cache))
        return torch.cat(states)

    @torch.inference_mode()
    def loop(
        self,
        ids: NDArray[np.int64],
        image: Image2D | None,
        latent_token_id: int,
        num_vectors: int,
        policy: SlotPositions,
    ) -> NDArray[np.float32]:
        """Vectors [num_vectors, H]: a prefill, then one step for each slot."""
        embeds, prompt = self.prompt(ids, image)
        slots = slot_positions(prompt, num_vectors - 1, policy)
        cache = DynamicCache(config=self.model.language_model.config)
        states = [self.step(embeds, prompt, cache)]
        latent = self.embeddings(np.array([latent_token_id]))
        states += [self.step(latent, slots[:, k : k + 1], cache) for k in range(num_vectors - 1)]
        return torch.nn.functional.normalize(torch.cat(states), dim=-1).numpy()

    def step(self, embeds: torch.Tensor, positions: NDArray[np.int64], cache: DynamicCache) -> torch.Tensor:
        """The last hidden state [1, H]; Gemma's prompt attends to all of itself."""
        mask = None
        if self.gemma:
            mask = torch.zeros(1, 1, embeds.shape[1], cache.get_seq_length() + embeds.shape[1])
        position_ids = torch.from_numpy(positions[:, None] if not self.gemma else positions)
        return self.run(
            self.wide(embeds),
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )[:, -1]


def reference_pixels(page: Image.Image, spec: ImageProcessing) -> Image2D:
    """A page for transformers: both frames of each patch (Qwen), or the whole image (SigLIP)."""
    patches, grid = preprocess(page, spec)
    side = spec.patch_size
    if spec.resize == "smart":
        return patches.reshape(-1, 3, 1, side**2).repeat(2, axis=2).reshape(len(patches), -1), grid
    image = patches.reshape(*grid, 3, side, side).transpose(2, 0, 3, 1, 4)
    return image.reshape(1, 3, grid[0] * side, grid[1] * side), grid


BACKBONES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "paligemma")
HIDDEN, PROJECTED = 96, 24  # of the tiny checkpoints, and what the projection makes of it
SPEC: dict[str, dict[str, Any]] = {
    "document": {"slots": "feedback", "num_vectors": 6, "slot_positions": "zero"},
    "query": {
        "slots": "learned",
        "prompt": "<bos>find: {text}<eos>",
        "num_vectors": 5,
        "slot_positions": "continue",
        "first_vector": "slot",
        "nested_budgets": [2, 5],
        "pooling": "mean",
    },
}
"""The head of the bundle `projected`: nothing is alike on both sides."""


@dataclass(frozen=True)
class Model:
    """A bundle and what it was made from."""

    bundle: Path
    embedder: Embedder
    reference: Reference
    head: dict[str, torch.Tensor]

    def document(self, page: Image.Image) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The reference's prompt for a page."""
        manifest, pixels = self.embedder.manifest, reference_pixels(page, self.embedder.manifest.image)
        tokens = pixels[1][0] * pixels[1][1] // manifest.image.merge_size**2
        return self.reference.prompt(self.embedder.inputs.prompter.document(manifest.document.prompt, tokens), pixels)

    def query(self, text: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The reference's prompt for a query."""
        prompt = self.embedder.manifest.query.prompt
        return self.reference.prompt(self.embedder.inputs.prompter.query(prompt, text), None)

    def rows(self, name: str, count: int) -> torch.Tensor:
        """The first rows of a slot table, as the decoder is fed them."""
        return self.head[f"slot_embeddings.{name}"][:count] * self.reference.scale

    def latent(self, count: int) -> torch.Tensor:
        """The row of the token <|latent|>, `count` times."""
        latent = json.loads((self.bundle / "tokenizer.json").read_text())["added_tokens"][-1]
        assert latent["content"] == "<|latent|>"
        with torch.inference_mode():
            return self.reference.embeddings(np.array([latent["id"]]))[0].expand(count, -1)

    def with_sides(self, document: Side | None = None, query: Side | None = None) -> Model:
        """The same graphs under another head: they depend neither on counts nor on policies nor on pooling."""
        manifest, bundle = self.embedder.manifest, copy.copy(self.embedder.bundle)
        bundle.manifest = replace(manifest, document=document or manifest.document, query=query or manifest.query)
        embedder = Embedder(bundle, EngineSettings(threads=1))
        embedder._sessions = self.embedder._sessions
        return replace(self, embedder=embedder)

    def with_both(self, change: Callable[[Side], Side]) -> Model:
        manifest = self.embedder.manifest
        return self.with_sides(change(manifest.document), change(manifest.query))


def copy_with_latent(golden: Path, root: Path) -> None:
    """A golden checkpoint without its projection, with a token <|latent|> and a row for it."""
    root.mkdir(parents=True)
    for path in golden.glob("*config.json"):
        (root / path.name).write_bytes(path.read_bytes())
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(golden / "model.safetensors").items()
        if "custom_text_proj" not in name
    }
    rows = weights["language_model.embed_tokens.weight"]
    row = torch.randn(1, rows.shape[1], generator=torch.Generator().manual_seed(1)) * rows.std()
    save_file(weights | {"language_model.embed_tokens.weight": torch.cat([rows, row])}, root / "model.safetensors")
    config = json.loads((root / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(rows) + 1
    (root / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((golden / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": len(rows), "content": "<|latent|>"})
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))


class Zoo:
    """Tiny checkpoints and bundles under one folder, each made when it is first asked for.

    Named like its backbone: MetaEmbed, the learned rows beside the checkpoint or, of qwen2.5-vl, in it. `projected`:
    PaliGemma with a projection and `SPEC`. `shallow`: the first two layers of Qwen2.5-VL, feedback, basic operators.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.sides = cache(self._sides)
        self.lock = FileLock(f"{root}.lock")  # other test processes use the same folder

    def checkpoint(self, backbone: Any) -> Path:
        root = self.root / f"checkpoint-{backbone}"
        with self.lock:
            if not root.exists():
                if backbone == "qwen3-vl":
                    copy_with_latent(GOLDEN / "colqwen3", root)
                else:
                    make_checkpoint(root, backbone, "causal", "tiny")
        return root

    def with_rows(self, backbone: str) -> Path:
        """The checkpoint with the learned rows among its weights."""
        root = self.root / f"learned-{backbone}"
        if not root.exists():
            root.mkdir()
            for path in self.checkpoint(backbone).iterdir():
                (root / path.name).write_bytes(path.read_bytes())
            weights = load_file(root / "model.safetensors") | load_file(self.head_weights())
            save_file(weights, root / "model.safetensors")
        return root

    def head_weights(self, *, projected: bool = False) -> Path:
        path = self.root / f"head-{projected}.safetensors"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            random = torch.Generator().manual_seed(7)

            def draw(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, generator=random) / math.sqrt(HIDDEN)

            rows = {"slot_embeddings.document": draw(64, HIDDEN), "slot_embeddings.query": draw(16, HIDDEN)}
            projection = {"custom_text_proj.weight": draw(PROJECTED, HIDDEN), "custom_text_proj.bias": draw(PROJECTED)}
            if projected:
                rows = {"slot_embeddings.query": rows["slot_embeddings.query"]} | projection
            save_file(rows, path)
        return path

    def options(self, name: str) -> tuple[ExportOptions, Path]:
        """How a bundle is exported, and where its head's weights are."""
        if name == "projected":
            path = self.root / "spec.json"
            path.write_text(json.dumps(SPEC))
            weights = self.head_weights(projected=True)
            model = str(self.checkpoint("paligemma"))
            return ExportOptions("paligemma", model, head_spec=path, head_weights=weights), weights
        if name == "shallow":
            model = str(self.checkpoint("qwen2.5-vl"))
            options = ExportOptions("qwen2.5-vl", model, head="feedback", num_layers=2, target="onnx", opset=20)
            return options, self.head_weights()
        if name == "qwen2.5-vl":
            return ExportOptions(name, str(self.with_rows(name)), head="metaembed"), self.head_weights()
        weights = self.head_weights()
        return ExportOptions(name, str(self.checkpoint(name)), head="metaembed", head_weights=weights), weights

    def _model(self, name: str) -> Model:
        bundle = self.root / f"bundle-{name}"
        with self.lock:
            options, weights = self.options(name)
            if not bundle.exists():
                export(options, bundle)
        reference = Reference(Path(options.model), options.num_layers)
        embedder = Embedder(Bundle(bundle), EngineSettings(threads=1))
        return Model(bundle, embedder, reference, load_file(weights))

    def _sides(self, backbone: str, head: str, num_vectors: int | None = None) -> tuple[Side, Side]:
        """The sides that the exporter makes of a head; the learned rows are as in the backbone's bundle."""
        with self.lock:
            weights = self.head_weights() if head in ("metaembed", "btoks") else None
            root = self.checkpoint(backbone)
        options = ExportOptions(
            backbone, str(root), head=head, head_weights=weights, num_vectors=num_vectors, query_vectors=num_vectors
        )
        plan = ExportPlan.make(options, root)
        return plan.document, plan.query

    def under(self, backbone: str, head: str, num_vectors: int | None = None) -> Model:
        """A backbone's bundle under another head."""
        return self.model(backbone).with_sides(*self.sides(backbone, head, num_vectors))
