"""What libcembed feeds to a model is what the Python runtime feeds to it. CEMBED_PREPARATION=long compares far more."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from preparation import MARKERS, Encoder, Library, RefusedError, compile_library, missing, pillows_pixels, processing
from texts import QWEN_SPECIAL, gemma, qwen, texts
from tokenizers import Tokenizer

from cembed.runtime import CembedError
from cembed.runtime.bundle.image_processing import ImageProcessing, Tiles
from cembed.runtime.bundle.manifest import Positions
from cembed.runtime.bundle.prompts import Prompter, load_tokenizer, page_prompt
from cembed.runtime.embed import positions
from cembed.runtime.embed.blank import parts_to_read
from cembed.runtime.embed.preprocess import page_patches, preprocess, resize, resized_size

LONG = os.environ.get("CEMBED_PREPARATION") == "long"
VOCABULARY, LINES, TEXTS, IMAGES = (60_000, 150_000, 100_000, 1000) if LONG else (2500, 3000, 2000, 150)
ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "tests/golden").glob("*/tokenizer.json")), ROOT / "samples/model/tokenizer.json"]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN_IMAGE = ImageProcessing("smart", 14, 2, 3136, 75264, 1 / 255, *CLIP, window_size=112)
SIGLIP_IMAGE = ImageProcessing("fixed", 14, 1, 224 * 224, 224 * 224, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
pytestmark = needs_compiler


def tiled(side: int, edge: int, patch: int, merge: int, most: int = 1024) -> ImageProcessing:
    """Pages in tiles of `side` pixels, most of them `most`."""
    tiles, area = Tiles(side, edge, **MARKERS), side**2
    return ImageProcessing("tiles", patch, merge, area, most * area, 1 / 255, *CLIP, tiles=tiles)


TILED = {
    "released": tiled(512, 2048, 16, 4),
    "idefics3": tiled(364, 1456, 14, 2),
    "odd": tiled(96, 511, 16, 3),
    "small": tiled(64, 50, 16, 2),
    "limited": tiled(128, 1000, 16, 2, most=7),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    path = tmp_path_factory.mktemp("native") / "preparation.so"
    compile_library(path)
    return Library(path)


def with_digits(tokenizer: str) -> str:
    """As SmolLM's: each number apart, then GPT-2's expression."""
    steps = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
    return json.dumps({**json.loads(tokenizer), "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})


MAKERS: dict[str, Callable[[], str]] = {
    "qwen": lambda: qwen(VOCABULARY, LINES),
    "gemma": lambda: gemma(VOCABULARY, LINES),
    "gemma without all bytes": lambda: gemma(VOCABULARY, LINES, bytes_known=200),
    "digits": lambda: with_digits(qwen(VOCABULARY, LINES)),
    **{f"{path.parent.name}": path.read_text for path in FILES},
}


@pytest.mark.parametrize("name", MAKERS)
def test_token_ids_equal_the_librarys(name: str, library: Library) -> None:
    data = MAKERS[name]()
    theirs, ours = Tokenizer.from_str(data), library.tokenizer(data)
    tokens = [token.content for token in theirs.get_added_tokens_decoder().values()]
    for text in texts(VOCABULARY, TEXTS, tokens):
        assert ours.ids(text) == theirs.encode(text, add_special_tokens=False).ids, f"{text = }"


@pytest.fixture(scope="module")
def small() -> str:
    return qwen(400, 100)


@pytest.mark.parametrize("digits", [False, True])
def test_every_character(library: Library, small: str, digits: bool) -> None:
    """Each code point between letters, digits and marks: what the tables say of it shows in how words are cut."""
    data = with_digits(small) if digits else small
    theirs, ours = Tokenizer.from_str(data), library.tokenizer(data)
    step = 1 if LONG else 64
    for code_point in [*range(0x3000), *range(0x3000, 0x110000, step)]:
        if not 0xD800 <= code_point < 0xE000:
            text = f"a{chr(code_point)}\u0316b1{chr(code_point)}1.{chr(code_point)}. {chr(code_point)}"
            assert ours.ids(text) == theirs.encode(text, add_special_tokens=False).ids, f"{code_point = :#x}"


def test_threads_share_a_tokenizer(library: Library, small: str) -> None:
    ours = library.tokenizer(small)
    wanted = {text: ours.ids(text) for text in texts(1, 200, QWEN_SPECIAL)}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.ids, [*wanted] * 5)) == [*wanted.values()] * 5


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"a\x80", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"\xf0\x9f\x98"],
)
def test_what_is_not_utf8_is_refused(text: bytes, library: Library, small: str) -> None:
    with pytest.raises(UnicodeDecodeError):
        text.decode()
    with pytest.raises(RefusedError, match="1, 'the text is not UTF-8'"):
        library.tokenizer(small).ids(b"good " + text + b" good")


def test_half_a_surrogate_pair_is_refused() -> None:
    prompter = Prompter(load_tokenizer(FILES[-1]), 4093)
    with pytest.raises(CembedError, match="not UTF-8"):
        prompter.query("{text}", "a \ud800 b")


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "NFKC"}}, "a normalizer of type NFKC"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}}, "Replace normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "a pre-tokenizer of type Whitespace"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "no expression, or two"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}}, "a Split by the expression"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}}, "a Digits"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"String": " "}}}, "what the normalizer leaves"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "dropout"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}}, r"the token '\?'"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "the token 'b'"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, "not two tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "'a' has no id"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "a merge of one token"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"], ["a", "a", "a"]]}}, "a merge of one token"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", ["a"]]]}}, "a merge that is no text"),
        ({"model": {"type": "BPE", "vocab": {"a": {"b": 0}}, "merges": []}}, "'a' has no id"),
        ({"model": None}, "damaged"),
        ({"added_tokens": [{"id": 0, "content": "<s>", "lstrip": True}]}, "the token '<s>' with lstrip"),
    ],
)  # fmt: skip
def test_other_components_are_refused_by_name(change: dict[str, Any], words: str, library: Library, small: str) -> None:
    with pytest.raises(RefusedError, match=words):
        library.tokenizer(json.dumps({**json.loads(small), **change}))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_tokens_that_strip_white_space_may_not_be_in_prompts(flag: str, library: Library, small: str) -> None:
    """ModernBERT's [MASK] is one; queries with it are refused as those with any control token."""
    content = json.loads(small)
    mask = {"id": 9999, "content": "[MASK]", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(mask | {"normalized": False, "special": True, flag: True})
    ours = library.tokenizer(json.dumps(content))
    assert ours.ids("a [MAS b") == library.tokenizer(small).ids("a [MAS b")
    with pytest.raises(RefusedError, match=r"'\[MASK\]', which strips white space, in a prompt"):
        ours.ids("a [MASK] b")


def test_damaged_files_are_refused(library: Library, small: str) -> None:
    """Every file that was cut off, and files with a wrong byte unless it is in a token's text."""
    data, rng = small.encode(), random.Random(0)
    for size in rng.sample(range(len(data)), 100):
        with pytest.raises(RefusedError):
            library.tokenizer(data[:size])
    with pytest.raises(RefusedError, match="not JSON"):
        library.tokenizer(data.replace(b'"<|im_end|>"', b'"\xff"'))


def result(compute: Callable[[], Any]) -> Any:
    """What is computed, or the message of its refusal."""
    try:
        return compute()
    except CembedError as error:
        return str(error)
    except RefusedError as error:
        return error.args[1]


PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"


def test_prompts_equal_pythons(library: Library) -> None:
    python, native = Prompter(load_tokenizer(FILES[-1]), 4093), library.tokenizer(FILES[-1].read_bytes())
    assert native.document(4093, PROMPT, 77).tolist() == python.document(PROMPT, 77).tolist()
    for text in texts(3, 500, ["<|im_end|>", "<|im_"]):
        wanted = result(lambda text=text: python.query("Query: {text}<|endoftext|>", text).tolist())  # type: ignore[misc]
        found = result(lambda text=text: native.query(4093, "Query: {text}<|endoftext|>", text).tolist())  # type: ignore[misc]
        assert found == wanted, f"{text = }"


def images(seed: int, count: int, largest: int) -> list[NDArray[np.uint8]]:
    """Noise, black and white, lines, and views into larger ones, of any shape."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        height, width = np.exp(rng.uniform(0, np.log(largest), 2)).astype(int)
        image = rng.integers(0, 256, (height, width + i % 3, 3), np.uint8)
        if i % 2:
            image = np.where(image[:, :, :1] < 128, np.uint8(0), np.uint8(255)) * np.ones(3, np.uint8)
        found.append(image[:, :width])
    return found


@pillows_pixels
@pytest.mark.parametrize("lanczos", [False, True])
def test_resized_bytes_equal_pillows(library: Library, lanczos: bool) -> None:
    resampling = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
    rng = np.random.default_rng(0)
    for i, image in enumerate(images(0, IMAGES, 1500)):
        height, width = np.exp(rng.uniform(0, np.log(900), 2)).astype(int).tolist()
        height, width = image.shape[0] if i % 9 == 1 else height, image.shape[1] if i % 9 == 2 else width
        wanted = np.asarray(Image.fromarray(image).resize((width, height), resampling))
        assert np.array_equal(library.resize(image, height, width, lanczos), wanted), (
            f"{image.shape} to {height} x {width}"
        )


@pillows_pixels
@pytest.mark.parametrize("spec", [QWEN_IMAGE, SIGLIP_IMAGE], ids=["qwen", "siglip"])
def test_pixel_values_equal_pythons(spec: ImageProcessing, library: Library) -> None:
    for image in images(1, IMAGES // 3, 2000):
        wanted = result(lambda image=image: preprocess(Image.fromarray(image), spec))  # type: ignore[misc]
        found = result(lambda image=image: library.preprocess(image, spec))  # type: ignore[misc]
        if isinstance(wanted, str):
            assert found == wanted
        else:
            assert found[1] == wanted[1]
            assert found[0].tobytes() == wanted[0].tobytes()


@pillows_pixels
@pytest.mark.parametrize("spec", TILED.values(), ids=TILED)
def test_tiles_equal_pythons(spec: ImageProcessing, library: Library) -> None:
    for image in images(2, IMAGES // 15, 900):
        wanted, grid = preprocess(Image.fromarray(image), spec)
        found = library.preprocess(image, spec)
        assert found[1] == grid
        assert found[0].tobytes() == wanted.tobytes()
        prompt = page_prompt("a {image} b", spec, grid)
        assert library.page_prompt("a {image} b", spec, grid) == prompt
        assert prompt.count("{image}") * (spec.input_patches or 0) == len(wanted)


def papers(seed: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """Pages of any size and colour, with noise, light that falls off, and some writing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(40, 700, 2)
        light = np.linspace(0, rng.choice([0, 0, 10, 60]), width)[:, None]
        page = rng.integers(0, 256, 3) - light + rng.uniform(0, 10) * rng.standard_normal((height, width, 1))
        for _ in range(rng.integers(0, 9)):
            top, left = rng.integers(0, height), rng.integers(0, width)
            page[top : top + rng.integers(1, 40), left : left + rng.integers(1, 200)] += rng.uniform(-90, 90)
        yield np.clip(page, 0, 255).astype(np.uint8)


@pillows_pixels
@pytest.mark.parametrize("spec", [QWEN_IMAGE, *TILED.values()], ids=["qwen", *TILED])
def test_what_is_read_equals_pythons(spec: ImageProcessing, library: Library) -> None:
    shares = list[float]()
    for image in papers(3, IMAGES // (15 if spec.tiles else 1)):
        page = resize(Image.fromarray(image), spec)
        read = parts_to_read(np.asarray(page), spec)
        found = library.preprocess(image, replace(spec, skip_blank=True))[0]
        assert found.tobytes() == page_patches(page, spec, read).tobytes()
        shares.append(float(read.mean()))
    assert spec.tiles or min(shares) < 0.2 < max(shares) == 1, shares


SIDES = st.integers(1, 30000)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES)
@example(height=14, width=42)  # halves are rounded to even
def test_sizes_equal_pythons(height: int, width: int, library: Library) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    found = library.call("cembed_resized", np.int64, height, width, *processing(QWEN_IMAGE))
    assert tuple(found) == resized_size(height, width, QWEN_IMAGE)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, name=st.sampled_from(list(TILED)))
def test_sizes_in_tiles_equal_pythons(height: int, width: int, name: str, library: Library) -> None:
    found = library.call("cembed_resized", np.int64, height, width, *processing(TILED[name]))
    assert tuple(found) == resized_size(height, width, TILED[name])


@pytest.mark.parametrize(
    ("shape", "stride", "change", "code"),
    [((0, 5), 15, {}, 1), ((5, 0), 0, {}, 1), ((2, 5), 14, {}, 1), ((1, 2**25), 3 * 2**25, {}, 1),
     ((9, 9), 27, {"patch_size": 0}, 2), ((9, 9), 27, {"merge_size": -2}, 2), ((9, 9), 27, {"max_pixels": 2**40}, 2),
     ((9, 9), 27, {"min_pixels": -1}, 2), ((9, 9), 27, {"resize": "fixed", "max_pixels": 1000}, 2)],
)  # fmt: skip
def test_images_and_sizes_that_are_refused(
    shape: tuple[int, int], stride: int, change: dict[str, Any], code: int, library: Library
) -> None:
    spec = ImageProcessing(**{**vars(QWEN_IMAGE), **change})
    image, (height, width) = np.zeros(300, np.uint8), shape
    with pytest.raises(RefusedError) as raised:
        library.call(
            "cembed_preprocess", np.float32, image, width, height, stride, *processing(spec), np.empty(2, np.int64)
        )
    assert raised.value.args[0] == code


GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda grid: (grid[0] * 2, grid[1] * 2))


@settings(max_examples=100, deadline=None)
@given(
    grid=GRIDS,
    before=st.integers(0, 5),
    behind=st.integers(0, 9),
    axes=st.sampled_from([1, 3]),
    first=st.integers(0, 2),
)
def test_prompt_positions_equal_pythons(
    grid: tuple[int, int], before: int, behind: int, axes: Any, first: int, library: Library
) -> None:
    ids = np.repeat(np.array([1, 7, 2], np.int64), [before, grid[0] * grid[1] // 4, behind])
    wanted = positions.prompt_positions(ids == 7, grid, Positions(axes, first), 2)
    size = np.array(grid, np.int64)
    found = library.call("cembed_prompt_positions", np.int64, ids, len(ids), 7, size, axes, first, 2)
    assert np.array_equal(found, wanted.reshape(-1))
    for policy in ("zero", "continue"):
        slots = positions.slot_positions(wanted, 9, policy)  # type: ignore[arg-type]
        arguments = np.ascontiguousarray(wanted), wanted.size, axes, 9, policy == "continue"
        assert np.array_equal(library.call("cembed_slot_positions", np.int64, *arguments), slots.reshape(-1))


@settings(max_examples=100, deadline=None)
@given(grid=GRIDS, window=st.sampled_from([28, 56, 112, 200]))
def test_windows_equal_pythons(grid: tuple[int, int], window: int, library: Library) -> None:
    spec, patches = ImageProcessing(**{**vars(QWEN_IMAGE), "window_size": window}), grid[0] * grid[1]
    places = library.call("cembed_patch_positions", np.int64, *grid, 2)
    assert np.array_equal(places, positions.patch_positions(grid, 2).reshape(-1))
    windows = positions.window_index(grid, spec)
    found = library.call("cembed_windows", np.int64, *grid, *processing(spec))
    assert np.array_equal(found, windows.reshape(-1))
    restore = library.call("cembed_window_restore", np.int64, found, len(found), patches)
    assert np.array_equal(restore, positions.window_restore(windows, patches))


@pytest.mark.parametrize("window", [0, 27, 28 * 4097, 28 * 4096])
def test_windows_that_no_bundle_has(window: int, library: Library) -> None:
    spec = ImageProcessing(**{**vars(QWEN_IMAGE), "window_size": window})
    with pytest.raises(RefusedError, match="window_size is out of range"):
        library.call("cembed_windows", np.int64, 80, 60, *processing(spec))


def test_text_alone_has_positions(library: Library) -> None:
    ids = np.arange(5, dtype=np.int64)
    found = library.call("cembed_prompt_positions", np.int64, ids, 5, 7, None, 3, 1, 2)
    assert found.reshape(3, 5).tolist() == [[1, 2, 3, 4, 5]] * 3


def test_an_image_without_its_tokens_is_refused(library: Library) -> None:
    ids = np.zeros(5, np.int64)
    with pytest.raises(RefusedError, match="fewer image tokens"):
        library.call("cembed_prompt_positions", np.int64, ids, 5, 7, np.array([4, 4], np.int64), 3, 0, 2)


def test_ids_are_the_embedders_own(library: Library) -> None:
    """An encoder outlives the JSON that it was read from."""
    encoders: list[Encoder] = [library.tokenizer(path.read_bytes()) for path in FILES]
    texts_of = ["Invoice 2026", "été"]
    wanted = [
        Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids for path in FILES for text in texts_of
    ]
    assert [encoder.ids(text) for encoder in encoders for text in texts_of] == wanted
