"""The loop of CausalEmbed, one slot at a time over a cache, on the models of transformers.

Positions and masks are handed to transformers, never taken from it. Weights are renamed here, independently of the
exporter, and loaded strictly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, DynamicCache
from transformers.models.gemma import GemmaModel
from transformers.models.paligemma import PaliGemmaModel
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl import Qwen2VLModel

from cembed.runtime.manifest import Positions, SlotPositions
from cembed.runtime.positions import prompt_positions, slot_positions

MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "paligemma": PaliGemmaModel}
PREFIXES = (
    ("model.language_model.model.", "language_model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("visual.", "visual."),
    ("model.", "language_model."),
)


def renamed(key: str) -> str:
    return next(new + key.removeprefix(old) for old, new in PREFIXES if key.startswith(old))


class Reference:
    def __init__(self, folder: Path) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.model: Any = MODELS[self.config.model_type](self.config).eval()
        state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "custom_text_proj" not in k}
        self.model.load_state_dict({renamed(key): value for key, value in state.items()}, strict=True)
        self.gemma = isinstance(self.model.language_model, GemmaModel)

    def embeddings(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return self.model.language_model.embed_tokens(torch.from_numpy(ids)[None])

    def image_features(self, pixel_values: NDArray[np.float32], grid: tuple[int, int]) -> torch.Tensor:
        """Features [V, H] of one image; Qwen: pixel_values [P, 1176], PaliGemma: [1, 3, side, side]."""
        pixels = torch.from_numpy(pixel_values)
        if self.gemma:
            return self.model.get_image_features(pixels).pooler_output[0]
        return self.model.get_image_features(pixels, torch.tensor([[1, *grid]])).pooler_output[0]

    @torch.inference_mode()
    def loop(
        self,
        ids: NDArray[np.int64],
        image: tuple[NDArray[np.float32], tuple[int, int]] | None,
        latent_token_id: int,
        num_vectors: int,
        policy: SlotPositions,
    ) -> NDArray[np.float32]:
        """Vectors [num_vectors, H]: a prefill, then one step for each slot."""
        is_image = ids == getattr(self.config, "image_token_id", getattr(self.config, "image_token_index", None))
        embeds = self.embeddings(ids)
        if image is not None:
            embeds[0, torch.from_numpy(is_image)] = self.image_features(*image)
        spec = Positions(axes=1, first=1) if self.gemma else Positions(axes=3, first=0)
        prompt = prompt_positions(is_image, image[1] if image else None, spec, 2)
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
        return self.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
