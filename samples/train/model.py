"""The sample model: a small Qwen2.5-VL out of the exporter's modules, and all heads on it at once.

The prompt is run once; each head's latent slots attend to the prompt and to the slots of their own head before them, so
the heads share a backbone and do not see each other. Letters as in `cembed/export/layers.py`; M slots, P patches, V
visual tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import CELLS, IMAGE, OTHER, patches_in_windows, window_order
from layouts import Size
from PIL import Image
from torch import Tensor, nn

from cembed.export.decoder import Decoder, DecoderConfig
from cembed.export.layers import QKV, Decomposed, Heads, Linear, apart
from cembed.export.qwen2_vl import DOCUMENT_PROMPT, QUERY_PROMPT
from cembed.export.qwen_vision import QwenVisionConfig, QwenVisionTower, Windows
from cembed.runtime.bundle.manifest import Positions
from cembed.runtime.bundle.prompts import Prompter, load_tokenizer
from cembed.runtime.embed.blank import parts_to_read
from cembed.runtime.embed.positions import patch_positions, prompt_positions

HEADS = ("causal", "feedback", "metaembed", "btoks", "colbert")
POSITIONS = Positions(axes=3, first=0)
PROJECTION = 128
SCALE = 3.3  # logarithm of what cosines are multiplied with before a softmax, to begin with
DOCUMENT_SLOTS = {"causal": 31, "metaembed": 64, "btoks": 16}
QUERY_SLOTS = {"causal": 15, "metaembed": 16, "btoks": 8}
LEARNED = ("metaembed", "btoks")
FEEDBACK = {"document": 15, "query": 7}


@dataclass(frozen=True)
class Dims:
    """Sizes of the model, under the names of `samples/random_checkpoint.py`."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 768
    vocab: int = 4096
    v_hidden: int = 192
    v_layers: int = 4
    v_heads: int = 6
    v_mlp: int = 512

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mrope(self) -> tuple[int, int, int]:
        quarter = self.head_dim // 8
        return quarter, self.head_dim // 4 - quarter // 2, self.head_dim // 4 - quarter // 2

    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp,
            activation="silu",
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            mrope_section=self.mrope,
            attention_bias=True,
            gemma=False,
            max_positions=4096,
        )

    def vision(self) -> QwenVisionConfig:
        return QwenVisionConfig(
            hidden_size=self.v_hidden,
            out_hidden_size=self.hidden,
            num_layers=self.v_layers,
            num_heads=self.v_heads,
            intermediate_size=self.v_mlp,
            activation="silu",
            patch_size=IMAGE.patch_size,
            merge_size=IMAGE.merge_size,
            windowed=True,
            window_size=IMAGE.window_size,
        )


@dataclass
class Prompt:
    """Inputs [B, S, H], positions [3, B, S], how many positions of each row are filled [B], and which of them are
    there [B, S]: pages have holes where blank paper is left out."""

    embeds: Tensor
    positions: Tensor
    lengths: Tensor
    there: Tensor


@dataclass
class Prefix:
    """A prompt that has run: hidden states [B, S, H] and each layer's keys and values [B, S, N_kv * D]."""

    prompt: Prompt
    hidden: Tensor
    cache: list[tuple[Tensor, Tensor]]

    @property
    def end(self) -> Tensor:
        """The hidden state [B, 1, H] of the last prompt position."""
        return self.hidden[torch.arange(len(self.hidden)), self.prompt.lengths - 1].unsqueeze(1)

    def attended(self) -> Tensor:
        """Bool [B, 1, 1, S]: the positions that are there."""
        return self.prompt.there[:, None, None]


class Holes(Windows):
    """Rows that are in windows [B * W, L, X] already, of which those of `there` [B * W, L] are attended to."""

    def __init__(self, there: Tensor) -> None:
        self.there = there | ~there.any(1, keepdim=True)  # of a window without any nothing is read

    def gather(self, x: Tensor) -> Tensor:
        return x

    def mask(self, batch: int) -> Tensor:
        return self.there[:, None, None]

    def scatter(self, x: Tensor, batch: int) -> Tensor:
        return x


class Training(Decomposed):
    """Attention written out: torch's own kernel for CPUs takes three times as long on the way back."""

    def attention(self, qkv: QKV, heads: Heads, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        q, k, v = apart(qkv, heads)
        if heads[0] != heads[1]:
            k, v = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            below = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            mask = below if mask is None else below & mask
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class SampleModel(nn.Module):
    def __init__(self, dims: Dims, tokenizer: Path) -> None:
        super().__init__()
        self.dims = dims
        self.visual = QwenVisionTower(dims.vision(), Training())
        self.decoder = Decoder(dims.decoder(), "causal", PROJECTION, Training())
        self.embed_tokens = nn.Parameter(torch.empty(dims.vocab, dims.hidden))
        self.slots = nn.ParameterDict(
            {
                f"{head}_{side}": nn.Parameter(torch.empty(counts[head], dims.hidden))
                for side, counts in (("document", DOCUMENT_SLOTS), ("query", QUERY_SLOTS))
                for head in LEARNED
            }
        )
        self.read_cells = Linear(dims.hidden, CELLS[0] * CELLS[1] * (OTHER + 1), bias=True)
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(SCALE)) for name in ("words", "pieces", *HEADS)}
        )
        self.tokenizer = load_tokenizer(tokenizer)
        self.latent = self.token("<|latent|>")
        self.image_token = self.token("<|image_pad|>")
        prompt = self.tokenizer.encode(DOCUMENT_PROMPT.split("{image}")[0], add_special_tokens=False)
        self.image_start = len(prompt.ids)
        self.prompter = Prompter(self.tokenizer, self.image_token)
        initialise(self)

    def token(self, text: str) -> int:
        found = self.tokenizer.token_to_id(text)
        assert found is not None, f"{text = } is not in the tokenizer"
        return int(found)

    def see(self, patches: Tensor, read: Tensor, size: Size) -> Tensor:
        """Features [B, V, H] of uint8 patches [B, P, 588] that are in windows: each window attends to itself, and in
        it to the visual tokens that are `read` [B, V]."""
        dtype = self.embed_tokens.dtype
        mean, std = (torch.tensor(values).repeat_interleave(196) for values in (IMAGE.mean, IMAGE.std))
        x = self.visual.patch_embed.proj(
            torch.addcmul((-mean / std).to(dtype), patches.to(dtype), (1 / (255 * std)).to(dtype))
        )
        order = torch.from_numpy(window_order(size))
        grid = (size[1] // 14, size[0] // 14)
        spots = torch.from_numpy(patch_positions(grid, 2)).unflatten(0, (-1, 4))[order].flatten(0, 1)
        cos, sin = (t.unflatten(1, (-1, 64)).flatten(0, 1) for t in self.visual.rotary_tables(spots, len(x), x.dtype))
        x = x.unflatten(1, (-1, 64)).flatten(0, 1)
        holes = Holes(read.repeat_interleave(4, dim=1).view(-1, 64))
        for block in self.visual.blocks:
            x = block(x, cos, sin, self.visual.dialect, holes)
        return self.visual.merger(x.unflatten(0, (len(patches), -1)).flatten(1, 2))

    def document_prompt(self, features: Tensor, read: Tensor, size: Size) -> Prompt:
        """`features` [B, V, H] in windows become the image tokens, row by row, where they are `read` [B, V]."""
        ids = self.prompter.document(DOCUMENT_PROMPT, features.shape[1])
        is_image = ids == self.image_token
        positions = prompt_positions(is_image, (size[1] // 14, size[0] // 14), POSITIONS, 2)
        start, batch = int(np.argmax(is_image)), len(features)
        text = self.embed_tokens[torch.from_numpy(ids)].expand(batch, -1, -1)
        rows = torch.from_numpy(np.argsort(window_order(size)))
        embeds = torch.cat([text[:, :start], features[:, rows], text[:, start + len(rows) :]], dim=1)
        there = torch.ones(embeds.shape[:2], dtype=torch.bool)
        there[:, start : start + len(rows)] = read[:, rows]
        places = torch.from_numpy(positions)[:, None].expand(-1, batch, -1)
        return Prompt(embeds, places, torch.full((batch,), len(ids)), there)

    def page_prompt(self, image: Image.Image, skip_blank: bool = False) -> Prompt:
        """Of one page, as the runtime reads it."""
        whole = np.ones(len(window_order(image.size)), bool)
        read = parts_to_read(np.asarray(image), IMAGE).reshape(-1)[window_order(image.size)] if skip_blank else whole
        read_rows = torch.from_numpy(read)[None]
        features = self.see(torch.from_numpy(patches_in_windows(image))[None], read_rows, image.size)
        return self.document_prompt(features, read_rows, image.size)

    def query_prompt(self, texts: list[str]) -> Prompt:
        rows = [torch.from_numpy(self.prompter.query(QUERY_PROMPT, text)) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1]).expand(3, len(texts), -1)
        lengths = torch.tensor([len(row) for row in rows])
        return Prompt(self.embed_tokens[ids], positions, lengths, torch.arange(ids.shape[1]) < lengths[:, None])

    def prefill(self, prompt: Prompt) -> Prefix:
        cache: list[tuple[Tensor, Tensor]] = []

        def attend(_: int, qkv: QKV) -> Tensor:
            cache.append(qkv[1:])
            mask = prompt.there[:, None, None]
            return self.decoder.dialect.attention(qkv, self.decoder.config.heads, causal=True, mask=mask)

        every = torch.arange(prompt.embeds.shape[1]).expand(len(prompt.embeds), -1)
        return Prefix(prompt, self.decoder.run(prompt.embeds, prompt.positions, every, attend), cache)

    def fill_slots(self, prefix: Prefix, inputs: Tensor, counts: list[int]) -> list[Tensor]:
        """States of slots after a prompt; `inputs` [M, H] has the slots of `counts[i]` heads side by side."""
        heads = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        own = (heads[:, None] == heads[None]) & torch.ones(len(heads), len(heads), dtype=torch.bool).tril()
        mask = torch.cat(
            [prefix.attended().expand(-1, -1, len(heads), -1), own.expand(len(prefix.hidden), 1, -1, -1)], -1
        )

        def attend(layer: int, qkv: QKV) -> Tensor:
            k, v = (torch.cat(pair, dim=1) for pair in zip(prefix.cache[layer], qkv[1:], strict=True))
            return self.decoder.dialect.attention((qkv[0], k, v), self.decoder.config.heads, mask=mask)

        steps = torch.cat([torch.arange(count) for count in counts]) + 1
        positions = self.behind(prefix, steps)
        rows = torch.arange(len(heads)).expand(len(prefix.hidden), -1)
        states = self.decoder.run(inputs.expand(len(prefix.hidden), -1, -1), positions, rows, attend)
        return list(states.split(counts, dim=1))

    def behind(self, prefix: Prefix, steps: Tensor) -> Tensor:
        """Positions [3, B, M] of slots that continue after the prompt's largest position."""
        filled = torch.arange(prefix.prompt.positions.shape[2]) < prefix.prompt.lengths[:, None]  # B S
        last = prefix.prompt.positions.masked_fill(~filled, 0).amax(dim=(0, 2))  # B
        return (last[:, None] + steps).expand(3, -1, -1)

    def feed_back(self, prefix: Prefix, count: int) -> Tensor:
        """States [B, count, H] of slots that are fed the hidden state of the position before them."""
        state, states = prefix.end, []
        past = list(prefix.cache)
        row = torch.zeros(len(state), 1, dtype=torch.int64)
        for step in range(1, count + 1):
            mask = torch.cat([prefix.attended(), torch.ones(len(state), 1, 1, step, dtype=torch.bool)], -1)

            def attend(layer: int, qkv: QKV, mask: Tensor = mask) -> Tensor:
                k, v = (torch.cat(pair, dim=1) for pair in zip(past[layer], qkv[1:], strict=True))
                past[layer] = k, v
                return self.decoder.dialect.attention((qkv[0], k, v), self.decoder.config.heads, mask=mask)

            state = self.decoder.run(state, self.behind(prefix, torch.tensor([step])), row, attend)
            states.append(state)
        return torch.cat(states, dim=1)

    def embed(self, prefix: Prefix, side: str, feedback: bool = False) -> dict[str, Tensor]:
        """Vectors [B, K, dim] of each head, normalised; those of `colbert` after a prompt's end are zero."""
        counts = DOCUMENT_SLOTS if side == "document" else QUERY_SLOTS
        latent = self.embed_tokens[self.latent].expand(counts["causal"], -1)
        inputs = torch.cat([latent, *(self.slots[f"{head}_{side}"] for head in LEARNED)])
        states = dict(zip(counts, self.fill_slots(prefix, inputs, list(counts.values())), strict=True))
        states["causal"] = torch.cat([prefix.end, states["causal"]], dim=1)
        states["btoks"] = states["btoks"].mean(1, keepdim=True)
        states["colbert"] = self.decoder.project(prefix.hidden)
        if feedback:
            states["feedback"] = torch.cat([prefix.end, self.feed_back(prefix, FEEDBACK[side])], dim=1)
        vectors = {head: nn.functional.normalize(state.float(), dim=-1) for head, state in states.items()}
        vectors["colbert"] = vectors["colbert"] * prefix.attended()[:, 0, 0, :, None]
        return vectors


def initialise(model: SampleModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if name.startswith("scales"):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif name.startswith(("embed_tokens", "slots")):
            nn.init.normal_(parameter, std=0.5 if name.startswith("embed") else 1.0, generator=generator)
        else:
            depth = model.dims.v_layers if name.startswith("visual") else model.dims.layers
            shrink = (
                math.sqrt(2 * depth) if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")) else 1
            )
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[0]) / shrink, generator=generator)
