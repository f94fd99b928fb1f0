"""Where a page matches: heat lies where the words are, what is hidden was never there, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, SAMPLES, BundleMaker, golden
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from reference import Zoo
from test_cli import cembed

from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder, Explanation, VectorFile, maxsim
from cembed.runtime.bundle.manifest import Side
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.embed.explain import FIRST_PARTS, CachedPage, ChangedPage, affordable, search, shows
from cembed.runtime.embed.heat import draw_heat, hottest_box
from cembed.runtime.embed.inputs import PagePrompt
from cembed.runtime.embed.latent import prefill

Floats = NDArray[np.float32]
BUNDLE = SAMPLES / "bundle"
SIZE = (336, 448)  # the sample model's pages
WORDS = {"pension": (40, 60), "lasagne": (180, 220), "bicycle": (60, 380)}
"""And their upper left corners."""


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(BUNDLE)


def drawn(words: dict[str, tuple[int, int]]) -> Image.Image:
    page, font = Image.new("RGB", SIZE, "white"), ImageFont.load_default(24)
    for word, place in words.items():
        ImageDraw.Draw(page).text(place, word, fill="black", font=font)
    return page


def box_of(word: str) -> tuple[float, float, float, float]:
    """Around a word that was drawn, in shares of the page."""
    left, top, right, bottom = ImageFont.load_default(24).getbbox(word)
    x, y = WORDS[word]
    return (x + left) / SIZE[0], (y + top) / SIZE[1], (x + right) / SIZE[0], (y + bottom) / SIZE[1]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def noise(width: int = 112, height: int = 168, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def check(found: Explanation, grid: tuple[int, int]) -> None:
    """What holds for any explanation of something that matched."""
    assert found.heat.dtype == np.float32
    assert found.heat.shape == grid
    assert found.heat.min() >= 0
    assert found.heat.max() == 1
    x0, y0, x1, y1 = found.hottest
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1
    row, column = np.unravel_index(found.heat.argmax(), grid)
    assert y0 <= (row + 0.5) / grid[0] <= y1
    assert x0 <= (column + 0.5) / grid[1] <= x1


# Where the heat is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("alone", [True, False])
def test_heat_is_on_the_word(word: str, alone: bool, embedder: Embedder) -> None:
    found = embedder.explain(drawn({word: WORDS[word]} if alone else WORDS), word)
    check(found, (16, 12))
    assert overlap(found.hottest, box_of(word))
    assert not any(overlap(found.hottest, box_of(other)) for other in WORDS if other != word)


def test_two_words_of_a_query_are_both_warm(embedder: Embedder) -> None:
    found = embedder.explain(drawn(WORDS), "pension bicycle")
    warm = [found.heat[slice(*rows), slice(*columns)].max() for rows, columns in map(cells_around, WORDS)]
    assert min(warm[0], warm[2]) > 2 * warm[1]


def cells_around(word: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the cells in which a word stands."""
    x0, y0, x1, y1 = box_of(word)
    return (int(16 * y0), int(16 * y1) + 1), (int(12 * x0), int(12 * x1) + 1)


def test_more_passes_make_a_finer_picture(embedder: Embedder) -> None:
    page = drawn(WORDS)
    levels = [len(np.unique(embedder.explain(page, "lasagne", passes=n).heat)) for n in (FIRST_PARTS, 8, 24)]
    assert levels[0] <= FIRST_PARTS
    assert levels == sorted(levels)
    assert embedder.explain(page, "lasagne", passes=8).runs == 9
    for few in (3, 0, -1):
        with pytest.raises(CembedError, match=f"passes is {few}: give 4 or more"):
            embedder.explain(page, "lasagne", passes=few)


def test_a_page_read_anew_says_the_same(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dear way, for bundles that cannot do the other one."""

    def anew(page: PagePrompt, budget: Budget, _: int | None) -> ChangedPage:
        return ChangedPage(lambda prompt: embedder.embed_prompt("document", prompt, budget), page)

    monkeypatch.setattr(embedder, "_reading", anew)
    for word in WORDS:
        assert overlap(embedder.explain(drawn(WORDS), word).hottest, box_of(word))


# What it leaves, and what it explains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(), Budget(7), Budget(9, 64)])
def test_the_score_is_that_of_the_page(budget: Budget, embedder: Embedder) -> None:
    page, text = drawn(WORDS), "the lasagne"
    before = embedder.embed_image(page, budget)
    query = embedder.embed_query(text, Budget(dim=budget.dim))
    found = embedder.explain(page, text, budget)
    np.testing.assert_allclose(found.score, maxsim([query], [before])[0, 0], rtol=1e-5)
    assert np.array_equal(embedder.embed_image(page, budget), before)
    again = embedder.explain(page, query, budget)
    assert (again.score, again.hottest, again.runs) == (found.score, found.hottest, found.runs)
    assert np.array_equal(again.heat, found.heat)


def latent(embedder: Embedder, image: Image.Image, num_vectors: int) -> tuple[PagePrompt, CachedPage]:
    page = embedder.inputs.page(image)
    reading = embedder._reading(page, Budget(num_vectors), num_vectors)
    assert isinstance(reading, CachedPage)
    return page, reading


SLOTTED = [
    (name, head) for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl") for head in ("causal", "metaembed", "feedback")
]


@pytest.mark.parametrize(("name", "head"), [*SLOTTED, ("shallow", "feedback")])
def test_what_is_hidden_was_never_in_the_cache(name: str, head: str, zoo: Zoo) -> None:
    """`shallow` has basic operators, and no graph but that of steps."""
    embedder = zoo.model(name).embedder if name == "shallow" else zoo.under(name, head).embedder
    page, reading = latent(embedder, noise(), 6)
    whole, cache = reading.whole(), reading._cache
    np.testing.assert_allclose(embedder.embed_image(noise(), Budget(6)), whole, rtol=0, atol=1e-5)
    before = {name: buffer[:, :, : cache.length].copy() for name, buffer in cache.buffers.items()}
    random = np.random.default_rng(0)
    for count in (1, 3, len(page.places) // 2, len(page.places) - 1, len(page.places)):
        hidden = np.sort(random.choice(page.places, count, replace=False))
        found = reading.without(hidden)
        copied = embedder._cache(cache.capacity)
        stay = np.setdiff1d(np.arange(cache.length), hidden)
        copied.fill({name: buffer[:, :, stay] for name, buffer in before.items()}, len(stay))
        step = embedder.session("text_step").bind(copied.buffers)
        states = prefill(step, copied, reading._rest, 6).state
        np.testing.assert_allclose(found, reading._loop.finish(states), rtol=0, atol=1e-5)
        assert all(np.array_equal(cache.buffers[name][:, :, : cache.length], kept) for name, kept in before.items())
    np.testing.assert_allclose(reading.without(np.zeros(0, np.int64)), whole, rtol=0, atol=1e-5)


def test_a_pass_that_failed_leaves_the_cache_whole(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    page, reading = latent(zoo.under("qwen2-vl", "causal").embedder, noise(), 4)
    expected = reading.without(page.places[3:5])

    def fail(*_: object) -> None:
        raise CembedError("ONNX Runtime failed")

    with monkeypatch.context() as patch:
        patch.setattr(type(reading._step), "run", fail)
        with pytest.raises(CembedError, match="ONNX Runtime failed"):
            reading.without(page.places[:2])
    assert np.array_equal(reading.without(page.places[3:5]), expected)


# Every kind of bundle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["colqwen2", "colpali"])
def test_a_vector_for_every_token(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name), threads=1)
    found = embedder.explain(noise(), "source code")
    check(found, embedder.kept(noise()).shape)
    assert found.runs == 1
    pages, queries = embedder.embed_images([noise()]), embedder.embed_queries(["source code"])
    np.testing.assert_allclose(found.score, maxsim(queries, pages)[0, 0], rtol=1e-5)
    merged = embedder.explain(noise(), "source code", Budget(pool_factor=3))
    assert np.array_equal(merged.heat, found.heat)
    pooled = maxsim(queries, embedder.embed_images([noise()], pool_factor=3))
    np.testing.assert_allclose(merged.score, pooled[0, 0], rtol=1e-5)


def test_a_token_that_a_query_is_like_is_the_hottest(bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of("colqwen2"), threads=1)
    page = embedder.inputs.page(noise())
    for token in (0, 7, len(page.places) - 1):
        found = embedder.explain(noise(), embedder.embed_image(noise())[page.places[token]][None])
        top, left, _, _ = page.cells[token]
        assert found.heat[top, left] == 1


def test_the_mean_of_all_tokens(zoo: Zoo) -> None:
    def pooled(side: Side) -> Side:
        return replace(side, slots="all_tokens", num_vectors=None, slot_rows=None, nested_budgets=(), pooling="mean")

    embedder = zoo.model("qwen2-vl").with_both(pooled).embedder
    found = embedder.explain(noise(), "x")
    check(found, (6, 4))
    queries, pages = embedder.embed_queries(["x"]), embedder.embed_images([noise()])
    np.testing.assert_allclose(found.score, (queries[0] @ pages[0].T)[0, 0], rtol=1e-5)


def last_position(side: Side) -> Side:
    return replace(side, slots="all_tokens", num_vectors=None, slot_rows=None, nested_budgets=(), pooling="last")


def test_pages_that_are_read_anew(zoo: Zoo) -> None:
    """One vector of the last position; prompts that attend both ways, with and without slots that are fed back."""
    single = zoo.model("qwen2-vl").with_both(last_position).embedder
    for embedder in (single, zoo.model("paligemma").embedder, zoo.model("projected").embedder):
        image = noise()
        found = embedder.explain(image, "x", passes=5)
        assert found.heat.shape == embedder.kept(image).shape
        assert found.runs <= 6
        query, page = embedder.embed_query("x"), embedder.embed_image(image)
        np.testing.assert_allclose(found.score, (query @ page.T).max(axis=1).sum(), rtol=1e-4)


def test_states_of_fixed_size_are_read_anew(zoo: Zoo, exported: Callable[[ExportOptions], Path]) -> None:
    checkpoint = str(GOLDEN / "colqwen3_5")
    options = ExportOptions("qwen3.5", checkpoint, head="metaembed", head_weights=zoo.head_weights())
    embedder = Embedder.load(exported(options), threads=1)
    found = embedder.explain(noise(), "x", Budget(6), passes=6)
    check(found, embedder.kept(noise()).shape)
    assert found.runs == 7


@pytest.mark.parametrize("skip_blank", [False, True])
@pytest.mark.parametrize("head", ["causal", None])
def test_tiles(head: str | None, skip_blank: bool, exported: Callable[[ExportOptions], Path]) -> None:
    """A cell is hidden in its tile and in the whole page, whose tokens show several cells each."""
    options = golden("colidefics3") if head is None else replace(golden("colidefics3"), head=head, latent_token=LATENT)
    embedder = Embedder.load(exported(options), threads=1, skip_blank=skip_blank)
    image = Image.new("RGB", (300, 400), "white")
    image.paste(noise(80, 60), (20, 20))
    page, tiles = embedder.inputs.page(image), embedder.manifest.image.tiles
    assert tiles is not None
    across = tiles.side // embedder.manifest.image.factor
    read = embedder.kept(image)
    assert page.grid == (across * read.shape[0], across * read.shape[1])
    assert len(page.places) == len(page.cells) == (read.sum() + 1) * across**2
    assert np.array_equal(page.cells.max(axis=0)[2:], page.grid)
    assert read.all() != skip_blank
    areas = (page.cells[:, 2] - page.cells[:, 0]) * (page.cells[:, 3] - page.cells[:, 1])
    assert np.array_equal(np.unique(areas), sorted({1, read.size}))
    found = embedder.explain(image, "source code")
    check(found, page.grid)


LATENT = "<|endoftext|>"


def test_a_cell_is_hidden_in_its_tile_and_in_the_page(exported: Callable[[ExportOptions], Path]) -> None:
    """The two tokens that show it are those of their images that change most where its pixels do."""
    embedder = Embedder.load(exported(golden("colidefics3")), threads=1)
    picture = embedder.inputs.page(noise(256, 256)).picture
    page = embedder.inputs.page(picture)
    row, column = 3, 2
    pixels, side = np.asarray(picture).copy(), page.cell
    pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
    change = np.abs(features(embedder, Image.fromarray(pixels)) - features(embedder, picture)).sum(axis=1)
    in_tiles = np.prod(page.grid)
    for part in (slice(0, in_tiles), slice(in_tiles, None)):
        hidden = shows(page.cells[part], (row, column, row + 1, column + 1))
        assert np.flatnonzero(hidden).tolist() == [change[part].argmax()]


def features(embedder: Embedder, image: Image.Image) -> Floats:
    page = embedder.inputs.page(image)
    rows: Floats = page.prompt.rows["inputs_embeds"][page.places]
    return rows


# Blank paper ----------------------------------------------------------------------------------------------------------


def test_what_is_not_read_has_no_heat() -> None:
    embedder = Embedder.load(BUNDLE, skip_blank=True)
    read = embedder.kept(drawn(WORDS))
    assert 0 < read.mean() < 0.8
    for word in WORDS:
        found = embedder.explain(drawn(WORDS), word)
        check(found, (16, 12))
        assert not found.heat[~read].any()
        assert overlap(found.hottest, box_of(word))


def test_where_nothing_matters_there_is_no_heat(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachedPage, "without", lambda self, hidden: self.whole())
    found = embedder.explain(drawn(WORDS), "pension")
    assert not found.heat.any()
    assert found.hottest == (0, 0, 0, 0)
    assert np.array_equal(np.asarray(found.picture(drawn(WORDS))), np.asarray(drawn(WORDS)))


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (16, 12), (3, 40)])
@pytest.mark.parametrize("passes", [4, 9, 24, 400])
def test_parts_cover_the_page_once(shape: tuple[int, int], passes: int) -> None:
    weights = np.random.default_rng(0).random(shape).round(1)
    weights.flat[-1] = 1
    asked: list[tuple[int, int, int, int]] = []

    def fall(box: tuple[int, int, int, int]) -> float:
        asked.append(box)
        return float(weights[box[0] : box[2], box[1] : box[3]].sum())

    count = np.zeros(shape, int)
    for top, left, bottom, right in search(weights, fall, passes):
        count[top:bottom, left:right] += 1
    assert (count[weights > 0] == 1).all()
    assert count.max() == 1
    assert len(set(asked)) == len(asked) <= passes


def test_the_part_that_matters_is_found() -> None:
    weights = np.ones((32, 22))
    falls = search(weights, lambda box: float(box[0] <= 20 < box[2] and box[1] <= 3 < box[3]), 24)
    best = max(falls, key=lambda box: falls[box])
    assert best[0] <= 20 < best[2]
    assert best[1] <= 3 < best[3]
    assert (best[2] - best[0]) * (best[3] - best[1]) <= 2


def test_passes_are_few_where_they_are_dear() -> None:
    assert affordable(738, 28, 330 << 20) == 8
    assert affordable(738, 738, 4 << 30) == 6
    assert affordable(10_000, 28, 4 << 30) == 24


# Pictures -------------------------------------------------------------------------------------------------------------


def test_a_picture_is_warm_where_the_page_is() -> None:
    heat = np.zeros((4, 3), np.float32)
    heat[1, 2] = 1
    page = Image.new("RGB", (300, 400), "white")
    picture = np.asarray(draw_heat(page, heat, hottest_box(heat))).astype(int)
    assert picture.shape == (400, 300, 3)
    red = picture[..., 0] - picture[..., 2]
    assert red[150, 250] > 100
    assert not red[:, :90].any()
    assert not red[310:].any()
    assert (picture[95:205, 195:] != 255).any()


@pytest.mark.parametrize("size", [(1, 1), (5, 700), (1240, 1754)])
def test_pages_of_any_size_and_mode(size: tuple[int, int], embedder: Embedder) -> None:
    found = Explanation(1.0, np.ones((2, 2), np.float32), (0.0, 0.0, 1.0, 1.0), 1)
    assert found.picture(Image.new("L", size)).size == size
    with pytest.raises(CembedError, match="an image is"):
        found.picture("page.png")  # type: ignore[arg-type]


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_what_is_no_query(embedder: Embedder) -> None:
    page, rows = drawn(WORDS), np.ones((2, 256), np.float32)
    for wrong in (rows.astype(np.float64), rows[0], rows[:, :128], rows[:0]):
        with pytest.raises(CembedError, match=r"vectors of a query are float32 \[n, 256\]"):
            embedder.explain(page, wrong)  # type: ignore[arg-type]
    with pytest.raises(CembedError, match=r"float32 \[n, 64\] here, not float32 \[2, 256\]"):
        embedder.explain(page, rows, Budget(dim=64))
    with pytest.raises(CembedError, match="NaN or infinity"):
        embedder.explain(page, np.full((1, 256), np.nan, np.float32))
    with pytest.raises(CembedError, match="a query is a string"):
        embedder.explain(page, 7)  # type: ignore[arg-type]
    with pytest.raises(CembedError, match="the query is empty"):
        embedder.explain(page, " ")
    with pytest.raises(CembedError, match="num_vectors is 0"):
        embedder.explain(page, "x", Budget(0))
    with pytest.raises(CembedError, match="an image is"):
        embedder.explain("page.png", "x")  # type: ignore[arg-type]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    """A folder with pages, a vector file and an index of them."""
    root = tmp_path_factory.mktemp("shelf")
    (root / "pages").mkdir()
    for word, place in WORDS.items():
        drawn({word: place}).save(root / "pages" / f"{word}.png")
    assert cembed("embed", BUNDLE, root / "pages", "--out", root / "pages.npz").status == 0
    assert cembed("index", "add", root / "index", root / "pages", "--bundle", BUNDLE).status == 0
    return root


@pytest.mark.parametrize("kind", ["pages.npz", "index"])
def test_pictures_of_what_was_found(kind: str, shelf: Path, tmp_path: Path) -> None:
    command = ("search", shelf / kind, "bicycle", "--bundle", BUNDLE, "--top", 2, "--explain-pages", tmp_path / "new/a")
    outcome = cembed(*command, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    rows = json.loads(outcome.out)
    assert [Path(row["picture"]).name[:6] for row in rows] == ["00001-", "00002-"]
    best = np.asarray(Image.open(rows[0]["picture"])).astype(int)
    page = np.asarray(Image.open(rows[0]["path"])).astype(int)
    assert best.shape == page.shape
    changed = np.abs(best - page).max(axis=2) > 60
    assert changed[370:420, 50:200].any()
    assert not changed[:300].any()


@pytest.mark.parametrize("kind", ["pages.npz", "index"])
def test_sources_that_are_gone_or_changed(kind: str, shelf: Path, tmp_path: Path) -> None:
    """Each is a line, and the others have their picture."""
    root = Path(shutil.copytree(shelf, tmp_path / "copy"))
    if kind == "pages.npz":
        file = VectorFile.load(root / kind)
        paths = [str(root / "pages" / Path(path).name) for path in file.paths]
        replace(file, paths=tuple(paths)).save(root / kind)
    else:
        shutil.rmtree(root / "index")
        assert cembed("index", "add", root / "index", root / "pages", "--bundle", BUNDLE).status == 0
    (root / "pages" / "pension.png").unlink()
    drawn({"lasagne": (20, 20)}).rotate(180).save(root / "pages" / "lasagne.png")
    outcome = cembed("search", root / kind, "lasagne", "--bundle", BUNDLE, "--explain-pages", tmp_path / "out")
    assert outcome.status == 3
    gone, changed = sorted(outcome.err.splitlines())
    assert gone == f"not explained: {root}/pages/pension.png, page 1: No such file or directory"
    assert changed.startswith(f"not the page that was found: {root}/pages/lasagne.png, page 1: its score is ")
    assert "lasagne.png" in outcome.out
    assert sorted(path.name[6:-6] for path in (tmp_path / "out").iterdir()) == ["bicycle", "lasagne"]


def test_a_folder_that_cannot_be_made(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = ("search", shelf / "pages.npz", "x", "--bundle", BUNDLE, "--explain-pages", tmp_path / "file" / "x")
    assert cembed(*command).error == f"cannot make {tmp_path}/file/x: Not a directory"
