"""The tokenizer of a checkpoint or its adapter, with the tokens that were added in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cembed.export.backbones import Backbone
from cembed.export.settings import Settings, one_line, read_json
from cembed.runtime.bundle.manifest import Side
from cembed.runtime.bundle.prompts import Prompter, load_tokenizer
from cembed.runtime.errors import CembedError

TOKENIZER, ROLES, LEGACY = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
MAX_BYTES = 1 << 28


@contextmanager
def failures_named(what: object) -> Iterator[None]:
    """Whatever the tokenizers library raises as a CembedError; a panic of its Rust code is no Exception."""
    try:
        yield
    except CembedError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CembedError(f"{what} is not a tokenizer that can be used: {one_line(error)}") from error


def read_tokenizer(places: Sequence[Path]) -> Tokenizer:
    """The tokenizer of the first of `places` that has one: the adapter's goes before the base's.

    A warning says that, if the two differ. Raises CembedError: none, one that is damaged, added tokens that contradict
    it.
    """
    files = (TOKENIZER, ROLES, LEGACY)
    used = next((place for place in places if any((place / name).exists() for name in files)), places[-1])
    tokenizer = open_tokenizer(used, places)
    for other in places[places.index(used) + 1 :]:
        if (other / TOKENIZER).exists():
            warn_if_different(tokenizer, used, open_tokenizer(other, [other]), other)
    return tokenizer


def open_tokenizer(root: Path, places: Sequence[Path]) -> Tokenizer:
    """The first tokenizer.json from `root` on, with the added tokens of `root`."""
    files = [place / TOKENIZER for place in places[places.index(root) :]]
    path = next((path for path in files if path.exists()), files[-1])
    check_model(path, read_json(path, MAX_BYTES))
    with failures_named(path):
        tokenizer = load_tokenizer(path)
    add_tokens(tokenizer, root, path)
    return tokenizer


def check_model(path: Path, content: Mapping[str, Any]) -> None:
    """Raises CembedError for what makes the tokenizers library end the process, or draw lots."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise CembedError(f"{path} has no model: save the checkpoint with a fast tokenizer")
    for name in ("continuing_subword_prefix", "dropout"):
        if model.get(name):
            raise CembedError(f"{path}: a model with {name} {model[name]!r:.80} is not supported")


def add_tokens(tokenizer: Tokenizer, root: Path, path: Path) -> None:
    """Adds what `root` names beside the tokenizer in `path`, as transformers does: tokens, and other flags of them."""
    declared, known = declared_tokens(root), tokenizer.get_added_tokens_decoder()
    with failures_named(path):
        tokenizer.add_tokens([token for place, token in declared.items() if repr(known.get(place)) != repr(token)])
    for place, token in declared.items():
        if (found := tokenizer.token_to_id(token.content)) != place:
            raise CembedError(
                f"{root}: the added token {token.content!r:.80} has number {place}, but {found} in {path}: "
                "save the checkpoint with a fast tokenizer"
            )


def declared_tokens(root: Path) -> dict[int, AddedToken]:
    """Added tokens by number, in order, of `tokenizer_config.json`, or of the older `added_tokens.json`."""
    roles = Settings.read(root / ROLES) if (root / ROLES).exists() else Settings(str(root / ROLES), {})
    tokens: dict[int, AddedToken] = {}
    if roles.has("added_tokens_decoder"):
        decoder = roles.section("added_tokens_decoder")
        for number in decoder.values:
            tokens[as_number(decoder, number)] = added_token(decoder.section(number))
    elif (root / LEGACY).exists():
        numbers = Settings.read(root / LEGACY)
        tokens = {numbers.count(text, least=0): AddedToken(text, normalized=True) for text in numbers.values}
    return dict(sorted(tokens.items()))


def added_token(token: Settings) -> AddedToken:
    special = token.flag("special", False)
    strip, words = {name: token.flag(name, False) for name in ("lstrip", "rstrip")}, token.flag("single_word", False)
    normalized = token.flag("normalized", not special)
    return AddedToken(token.text("content"), **strip, single_word=words, normalized=normalized, special=special)


def as_number(decoder: Settings, number: str) -> int:
    if not number.isdecimal() or len(number) > 9:
        raise CembedError(f"{decoder.where}: {number!r:.80} is no number of a token")
    return int(number)


def warn_if_different(tokenizer: Tokenizer, used: Path, base: Tokenizer, other: Path) -> None:
    if tokenizer.to_str() == base.to_str():
        return
    new = sorted(tokenizer.get_vocab().keys() - base.get_vocab().keys())
    few = ", ".join(map(repr, new[:3])) + (", …" if len(new) > 3 else "")
    more = f"{len(new)} tokens more ({few})" if new else "the same tokens, and other rules or numbers"
    warnings.warn(f"the tokenizer of {used} is used, not that of {other}: it has {more}", RuntimeWarning, stacklevel=2)


def prompts_of(backbone: Backbone, tokenizer: Tokenizer, root: Path) -> tuple[str, str]:
    """A backbone's prompts as its processor's begin and end: the runtime's tokenizer adds nothing by itself."""
    if not backbone.tokenizer_adds:
        return backbone.prompts
    before, after = around(tokenizer, root)
    document, query = (before + prompt + after for prompt in backbone.prompts)
    return document, query


def around(tokenizer: Tokenizer, path: Path) -> tuple[str, str]:
    """The text of the tokens that the tokenizer itself puts before and after every text.

    Raises CembedError if that cannot be written as text.
    """
    with failures_named(path):
        encoding, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
        start = next(i for i, added in enumerate([*encoding.special_tokens_mask, 0]) if not added)
        parts = encoding.tokens[:start], encoding.tokens[start + len(bare.ids) :]
        before, after = ("".join(part) for part in parts)
        again = tokenizer.encode(f"{before}a{after}", add_special_tokens=False)
    if again.ids != encoding.ids:
        raise CembedError(f"{path} adds {encoding.tokens} to a text, which is no text that gives the same tokens")
    return before, after


def check_prompts(tokenizer: Tokenizer, image_token_id: int, sides: tuple[Side, Side], most: int) -> None:
    """Raises CembedError: prompts that cannot be encoded, without one image token, or too long for `most` positions."""
    if image_token_id not in tokenizer.get_added_tokens_decoder():
        raise CembedError(f"the config's image token {image_token_id} is no added token of the tokenizer")
    prompter = Prompter(tokenizer, image_token_id)
    with failures_named(f"{TOKENIZER} of the checkpoint"):
        page, query = prompter.document(sides[0].prompt, 1), prompter.query(sides[1].prompt, "x")
    if (page == image_token_id).sum() != 1:
        raise CembedError(f"the tokenizer does not find one image token in the prompt {sides[0].prompt!r:.200}")
    for name, length, side in (("page", len(page), sides[0]), ("query", len(query), sides[1])):
        slots = 0 if side.num_vectors is None else side.num_slots(side.num_vectors)
        if length + slots > most:
            raise CembedError(f"a {name} takes {length} positions and {slots} for its slots: the model has {most}")
