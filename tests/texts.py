"""Texts and tokenizers for comparing tokenizers: 30 scripts, code, emoji, odd white space, marks out of order."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

# First letter and how many follow: Latin, with accents, Greek, Cyrillic, Armenian, Hebrew, Arabic, Syriac, Devanagari,
# Bengali, Gurmukhi, Gujarati, Tamil, Telugu, Kannada, Malayalam, Sinhala, Thai, Lao, Tibetan, Myanmar, Georgian, jamo,
# Hangul, Ethiopic, Cherokee, Khmer, Mongolian, Hiragana, Katakana, Han, Gothic, Adlam.
SCRIPTS = (
    (0x61, 26), (0xE0, 120), (0x3AC, 34), (0x430, 48), (0x561, 38), (0x5D0, 27), (0x620, 43), (0x710, 48), (0x905, 72),
    (0x985, 72), (0xA05, 72), (0xA85, 72), (0xB85, 72), (0xC05, 72), (0xC85, 72), (0xD05, 72), (0xD85, 72), (0xE01, 58),
    (0xE81, 60), (0xF40, 68), (0x1000, 64), (0x10D0, 43), (0x1100, 256), (0xAC00, 400), (0x1200, 200), (0x13A0, 80),
    (0x1780, 72), (0x1820, 88), (0x3041, 86), (0x30A1, 86), (0x4E00, 800), (0x10330, 27), (0x1E900, 68),
)  # fmt: skip
SPACES = [
    chr(c) for c in (9, 10, 11, 12, 13, 0x1C, 0x1F, 0x20, 0x20, 0x85, 0xA0, 0x1680, 0x2003, 0x200B, 0x2028, 0x202F)
]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
COMPOSED = [chr(c) for c in range(0x110000) if unicodedata.decomposition(chr(c))]
EMOJI = ["😀", "👩‍💻", "👍🏽", "🇩🇪", "❤️", "🏳️‍🌈", "👨‍👩‍👧‍👦", "⌚", "1️⃣", "🫠", "🪿", "🩷"]
CODE = [
    "def f(x):\n\treturn x**2  # no",
    'for (int i=0; i<n; ++i) {\n    a[i] += "\\n";\n}',
    "SELECT * FROM t WHERE a>=10; {'a': [1, 2.5e-3]}",
    "<table><td>x</td></table> https://a.b/c?d=e&f=%20#g",
    "don't we'll I'VE they'RE it'\u017f 'S'd x→y ≠ z…",
]
NUMBERS = "0123456789\u0660\u0967三Ⅷ½²㊷\U0001d7d8\U000104a0"


def word(rng: random.Random) -> str:
    """Syllables of one script, few of them often: so that merges matter."""
    first, count = rng.choice(SCRIPTS)
    return "".join(chr(first + min(int(rng.expovariate(0.15)), count - 1)) for _ in range(rng.randint(1, 9)))


def sentence(rng: random.Random) -> str:
    return " ".join(word(rng) for _ in range(rng.randint(1, 12))) + rng.choice(["", ".", "!", "?\n", ", ", "。"])


def anything(rng: random.Random) -> str:
    code_points = (
        rng.randrange(rng.choice([0x80, 0x800, 0x3000, 0x10000, 0x20000, 0x110000])) for _ in range(rng.randint(1, 30))
    )
    return "".join(chr(c) for c in code_points if not 0xD800 <= c < 0xE000)


def marked(rng: random.Random) -> str:
    """Bases with marks in any order, composed characters, jamo."""
    bases = [*"aeoAEOuUiωЖ가각각", *rng.sample(COMPOSED, 10), "ে", "া", "ஒ", "க"]
    return "".join(
        rng.choice(bases) + "".join(rng.choices(MARKS, k=rng.choice([0, 0, 1, 1, 2, 4])))
        for _ in range(rng.randint(1, 12))
    )


def mixed(rng: random.Random, tokens: list[str]) -> str:
    parts: list[Callable[[], str]] = [
        lambda: word(rng), lambda: rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 3, 17]), lambda: rng.choice(EMOJI),
        lambda: rng.choice(CODE), lambda: rng.choice(NUMBERS) * rng.randint(1, 4), lambda: rng.choice(tokens),
        lambda: rng.choice(tokens)[: rng.randint(1, 8)], lambda: anything(rng)[:3], lambda: marked(rng)[:4],
        lambda: "".join(rng.choices("'\"-_.,;:!?()[]{}<>/|@#$%^&*+=~`", k=rng.randint(1, 4))),
    ]  # fmt: skip
    return "".join(rng.choice(parts)() for _ in range(rng.randint(1, 16)))


def texts(seed: int, count: int, tokens: list[str]) -> Iterator[str]:
    rng = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: sentence(rng), lambda: anything(rng), lambda: marked(rng), lambda: mixed(rng, tokens),
        lambda: mixed(rng, tokens), lambda: "\n".join([*rng.sample(CODE, 2), sentence(rng)]),
        lambda: rng.choice(EMOJI + SPACES + MARKS) * rng.randint(1, 40),
    ]  # fmt: skip
    yield from ("", " ", "\n", "\0", "a" * 3000, "▁ ▁▁  ▁", "\u0301", "e\u0301", "\U0010ffff", "\ufeffx", "\r\n\r\n x")
    for _ in range(count):
        yield rng.choice(kinds)()


def added(token: str, index: int, special: bool = False, normalized: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": index, "content": token, **flags}


QWEN_SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "image_pad", "latent")]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(tokenizer: Tokenizer, vocabulary: int, lines: int, alphabet: list[str]) -> dict[str, Any]:
    rng = random.Random(vocabulary)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((sentence(rng) if i % 4 else mixed(rng, ["\n"]) for i in range(lines)), trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    return data


def qwen(vocabulary: int, lines: int) -> str:
    """The components of Qwen2-VL's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    data = train(tokenizer, vocabulary, lines, pre_tokenizers.ByteLevel.alphabet())
    size = len(data["model"]["vocab"])
    data["added_tokens"] = [added(token, size + i, special=True) for i, token in enumerate(QWEN_SPECIAL)]
    data["added_tokens"] += [added("<tool_call>", size + 50), added("caf\u0065\u0301", size + 51, normalized=True)]
    return json.dumps(data, ensure_ascii=False)


def gemma(vocabulary: int, lines: int, bytes_known: int = 256) -> str:
    """The components of PaliGemma's tokenizer.json; merges as strings, as older files have them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    data = train(tokenizer, vocabulary, lines, [])
    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        *(f"<unused{i}>" for i in range(99)),
        "<image>",
        "<loc0000>",
    ]
    plain = (
        ["\n" * n for n in range(2, 20)] + ["▁" * n for n in range(2, 20)] + ["<table>", "</table>", "<td>", "</h1>"]
    )
    heads = [*special[:5], *(f"<0x{byte:02X}>" for byte in range(bytes_known)), *special[5:], *plain]
    learned = [token for token in data["model"]["vocab"] if token not in heads]
    data["model"]["vocab"] = {token: i for i, token in enumerate([*heads, *learned])}
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    data["added_tokens"] = [added(token, heads.index(token), special=token in special) for token in [*special, *plain]]
    data["added_tokens"] += [
        added("<seg000>", len(heads) + len(learned), normalized=True),
        added("two words", 0, normalized=True),
    ]
    return json.dumps(data, ensure_ascii=False)
