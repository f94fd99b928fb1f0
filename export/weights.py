"""Safetensors files of a checkpoint: which ones there are, and their tensors by key."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cembed.export.settings import one_line, read_json, require_file
from cembed.runtime.errors import CembedError

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = re.compile(r"^(?:(?:base_model|model|language_model|text_model|vlm|module)\.)+")
_SPELLINGS = (
    ("embedding_proj_layer.", "custom_text_proj."),
    ("linear.", "custom_text_proj."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_model.", "vision_tower."),
    ("connector.modality_projection.proj.", "connector.modality_projection."),
    ("embeddings.tok_embeddings.", "embed_tokens."),
)


def canonical_name(key: str) -> str:
    """The name of a checkpoint key without the prefixes of the classes that wrapped it.

    >>> canonical_name("model.language_model.layers.0.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    >>> canonical_name("base_model.model.custom_text_proj.weight")
    'custom_text_proj.weight'
    """
    name = _WRAPPERS.sub("", key)
    for spelling, ours in _SPELLINGS:
        if name.startswith(spelling):
            name = ours + name.removeprefix(spelling)
    return name


def weight_files(root: Path) -> list[Path]:
    """The safetensors files of a model: `model.safetensors` before an index, as transformers reads them; else all.

    Raises CembedError: there are none, an index that is odd or names files that are not in `root`. Pickles are never
    opened.
    """
    index = root / INDEX
    if index.exists() and (root / SINGLE).exists():
        warnings.warn(f"{root}: {SINGLE} is read, not the shards of {INDEX}", RuntimeWarning, stacklevel=2)
        return [root / SINGLE]
    if index.exists():
        return shards(index)
    files = sorted(path for path in root.glob("*.safetensors") if path.name != ADAPTER)
    if not files:
        raise CembedError(f"{root} has no *.safetensors file: {refused_pickle(root, *_PICKLES) or 'found none'}")
    return files


def shards(index: Path) -> list[Path]:
    """The files that an index names. Raises CembedError: it names none, another kind of file, one that is missing."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CembedError(f"{index} has no weight_map of tensors and their files: save the checkpoint again")
    for name in names.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CembedError(f"{index} names {name!r:.80}, which is no *.safetensors file beside it")
    files = sorted({index.parent / name for name in names.values()})
    if missing := [path.name for path in files if not path.is_file()]:
        raise CembedError(f"{index} names {missing[0]}, which is missing: {len(missing)} of {len(files)} files are")
    return files


def refused_pickle(root: Path, *patterns: str) -> str:
    """What to do about a pickle in `root`; nothing if there is none."""
    pickles = sorted(path.name for pattern in patterns for path in root.glob(pattern))
    return f"found {pickles[0]}, a pickle, which can run code: convert it to safetensors" if pickles else ""


class Weights:
    """All tensors of some safetensors files, by key. Raises CembedError: no such file, damaged, a key in two files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in files:
            require_file(path)
            try:
                opened = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CembedError(f"{path} cannot be read as safetensors: {one_line(error)}") from error
            for key in opened.keys():  # noqa: SIM118
                if key in self._files:
                    raise CembedError(f"{key} is in {self._files[key][0]} and in {path.name}: remove the stale file")
                self._files[key] = path, opened

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header of its file."""
        return tuple(self._files[key][1].get_slice(key).get_shape())

    def load(self, key: str) -> Tensor:
        """Raises CembedError: a tensor of integers or of quantised floats, or one that cannot be read."""
        path, file = self._files[key]
        if (kind := file.get_slice(key).get_dtype()) not in _FLOATS:
            raise CembedError(f"{path}: {key} has type {kind}: export a checkpoint that is not quantised")
        try:
            tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, RuntimeError) as error:
            raise CembedError(f"{path}: {key} cannot be read: {one_line(error)}") from error
        return tensor
