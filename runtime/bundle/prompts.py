"""From a prompt and an input to `input_ids`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.schema import parse
from cembed.runtime.errors import CembedError

QUERY_POSITIONS = 512
"""What engines of fixed shapes leave room for in the prompt of a query; a page's prompt is known."""


_REFUSED = ("continuing_subword_prefix", "dropout")
_SIGNS = (re.compile(rb'"(?:%s)"(?!\s*:\s*null)' % "|".join(_REFUSED).encode()), re.compile(rb"\\u00[2-7]"))


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises CembedError if `path` is not a tokenizer as the `tokenizers` library writes it, or one of a kind that is
    refused."""
    with panics_named(f"{path} is not a tokenizer"):
        content = path.read_bytes()
        check_model(path, content)
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()  # settings left over from training, which transformers resets as well
    tokenizer.no_padding()
    return tokenizer


def check_model(path: Path, content: bytes) -> None:
    """Raises CembedError for what makes the `tokenizers` library end the process, or draw lots.

    Parsing takes longer than all the rest of loading: only what shows a sign of such a model is parsed. An escape of an
    ASCII character, which nobody writes, could hide a name.
    """
    if not any(sign.search(content) for sign in _SIGNS):
        return
    parsed = parse(content.decode("utf-8"), str(path))
    model = parsed.get("model", {}) if isinstance(parsed, dict) else {}
    for name in _REFUSED:
        if isinstance(model, dict) and model.get(name):
            raise CembedError(f"{path}: a model with {name} {model[name]!r:.80} is not supported")


@contextlib.contextmanager
def panics_named(what: str) -> Iterator[None]:
    """What `tokenizers` raises becomes a CembedError: Exception itself, or a panic of its Rust code, which is none.

    The CembedError's cause is what was raised.
    """
    try:
        yield
    except CembedError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CembedError(f"{what}: {' '.join(str(error).split()):.200}") from error


class Prompter:
    """Fills prompts. The text of a user never turns into control tokens: it is refused if it contains one.

    A prompt is tokenised as one string, prefix, text and suffix together, as the processors of the checkpoints do.
    Raises CembedError: the tokenizer has no such image token.
    """

    def __init__(self, tokenizer: Tokenizer, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        token = tokenizer.id_to_token(image_token_id)
        if not token:
            raise CembedError(f"the tokenizer has no image token {image_token_id}")
        self._image_token: str = token
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def _encode(self, text: str) -> NDArray[np.int64]:
        with panics_named("the tokenizer failed"):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def document(self, prompt: str, num_visual_tokens: int) -> NDArray[np.int64]:
        """`input_ids` [S]: the prompt with each `{image}` in it become `num_visual_tokens` image tokens."""
        ids = self._encode(prompt.replace("{image}", self._image_token))
        return np.repeat(ids, np.where(ids == self._image_token_id, num_visual_tokens, 1))

    def query(self, prompt: str, text: str) -> NDArray[np.int64]:
        """`input_ids` [S] of a prompt with `{text}` filled in.

        Raises CembedError: not a string, half a surrogate pair in it, nothing but white space, or a control token of
        the model in it.
        """
        if not isinstance(text, str):
            raise CembedError(f"a query is a string, not {type(text).__name__}")
        if any("\ud800" <= character < "\ue000" for character in text):
            raise CembedError("the text is not UTF-8")
        if not text.strip():
            raise CembedError("the query is empty")
        if found := self._special.search(text):
            raise CembedError(f"the query contains {found.group()!r}, a control token of the model: remove it")
        return self._encode(prompt.replace("{text}", text))


def page_prompt(
    prompt: str, image: ImageProcessing, grid: tuple[int, int], read: NDArray[np.bool_] | None = None
) -> str:
    """The prompt of a page of `grid` patches: where it comes in tiles, `{image}` is there for each, between markers.

    `read` says which tiles [rows, columns] are there, by default all.
    """
    if image.tiles is None:
        return prompt
    side = image.tiles.side // image.patch_size
    tiles_read = None if read is None else read.tolist()
    return prompt.replace("{image}", image.tiles.fill(grid[0] // side, grid[1] // side, tiles_read))


def longest_page(prompter: Prompter, prompt: str, image: ImageProcessing) -> int:
    """Positions of the longest prompt that a page can have."""
    if image.tiles is None:
        return len(prompter.document(prompt, image.max_visual_tokens))
    area = image.tiles.side**2
    prompts = [image.tiles.fill(*grid) for grid in image.tiles.grids(image.max_pixels // area)]
    return max(len(prompter.document(prompt.replace("{image}", text), area // image.factor**2)) for text in prompts)


def check_prompt(prompt: str, placeholder: str) -> str:
    """`prompt`, if it holds `placeholder` exactly once; else CembedError."""
    if prompt.count(placeholder) != 1:
        raise CembedError(f"the prompt {prompt!r} must contain {placeholder} exactly once")
    return prompt
