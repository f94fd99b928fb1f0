"""Judged retrieval: the measures, the data set's files, what a storage type costs, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_cli import cembed

from cembed.runtime import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.evaluate import Dataset, evaluate, measure, rank, require_ir_measures
from cembed.runtime.pages.documents import PageReader
from cembed.runtime.scoring.maxsim import maxsim
from cembed.runtime.scoring.storage import STORAGE

COLOURS = ("red", "green", "blue", "orange", "black", "white")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six pages, four questions; the last question has no answer and the third has two."""
    folder = tmp_path / "data"
    (folder / "pages").mkdir(parents=True)
    for index, colour in enumerate(COLOURS):
        page = Image.new("RGB", (112, 112), colour)
        ImageDraw.Draw(page).line((0, 20 * index, 111, 111), fill="grey", width=9)
        page.save(folder / "pages" / f"{colour}.png")
    rows = [{"_id": f"q{n}", "text": f"where is {c}?", "part": "ab"[n % 2]} for n, c in enumerate(COLOURS[:4])]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    judged = ("q0\tred.png\t1", "q1\tgreen.png\t2", "q2\tblue.png\t1", "q2\torange.png\t1", "q3\tred.png\t0")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    return folder


def test_measures_are_those_of_the_definition(dataset: Path) -> None:
    """q0 finds its page at rank 1, q1 at rank 3, q2 its two pages at ranks 2 and 7."""
    run = {
        "q0": {"red.png": 9.0, "green.png": 1.0},
        "q1": {"x": 3.0, "y": 2.0, "green.png": 1.0},
        "q2": {"x": 9.0, "blue.png": 8.0, "a": 7.0, "b": 6.0, "c": 5.0, "d": 4.0, "orange.png": 3.0},
    }
    rows = {part: (of, count) for part, of, count in measure(require_ir_measures(), Dataset.read(dataset), run)}
    gain = [1.0, 1 / math.log2(4), 1 / math.log2(3) / (1 + 1 / math.log2(3))]
    overall, count = rows["all"]
    assert count == 3
    assert overall["nDCG@5"] == pytest.approx(np.mean(gain))
    assert overall["recall@1"] == pytest.approx(1 / 3)
    assert overall["recall@5"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert overall["recall@10"] == pytest.approx(1)
    assert overall["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert rows["a"][1] == 2
    assert rows["b"][0]["nDCG@5"] == pytest.approx(gain[1])


def test_ranks_are_by_falling_score_and_cut() -> None:
    scores = np.arange(300, dtype=np.float32).reshape(2, 150)
    ranked = rank(["a", "b"], [str(n) for n in range(150)], scores)
    assert list(ranked["a"])[:3] == ["149", "148", "147"]
    assert len(ranked["b"]) == 100


def test_every_page_found_by_itself_scores_one(causal_bundle: Path, dataset: Path) -> None:
    """With the pages' own vectors as queries the right page is first at the full budget."""
    embedder = Embedder.load(causal_bundle)
    pages = {c: np.asarray(Image.open(dataset / "pages" / f"{c}.png").convert("RGB")) for c in COLOURS}
    asked = {f"where is {c}?": page for c, page in pages.items()}
    embedder.embed_query = lambda text, *_: embedder.embed_images([asked[text]])[0]  # type: ignore[method-assign]
    (dataset / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\t{c}.png\t1\n" for n, c in enumerate(COLOURS[:4]))
    )
    result = evaluate(embedder, Dataset.read(dataset), storage=("f32", "f16", "u8"))
    assert {row.vectors for row in result.rows} == {1, 2, 4, 8}
    assert all(row.measures["nDCG@5"] == 1.0 for row in result.rows if row.vectors == 8), result.rows


@pytest.mark.parametrize("name", STORAGE)
def test_storage_keeps_scores_near_and_says_its_bytes(name: str) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((32, 256)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    restored = STORAGE[name].restore(vectors)
    size = {"f32": 4 * 32 * 256, "f16": 2 * 32 * 256, "u8": 32 * 256 + 4, "bits": 32 * 32}[name]
    assert STORAGE[name].page_size(vectors) == size
    worst = {"f32": 0.0, "f16": 1e-3, "u8": 2e-2, "bits": 0.3}[name]
    score = maxsim([vectors], [restored])[0, 0] / 32
    assert abs(score - 1) <= worst
    assert restored.dtype == np.float32


def test_command_prints_table_json_and_picture(causal_bundle: Path, dataset: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    outcome = cembed(
        "eval", causal_bundle, dataset, "--json", "--budgets", "8,2", "--storage", "f32,bits", "--plot", picture
    )
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["pages"] == 6
    rows = result["rows"]
    assert [(r["vectors"], r["storage"]) for r in rows if r["part"] == "all"] == [
        (2, "f32"),
        (2, "bits"),
        (8, "f32"),
        (8, "bits"),
    ]
    assert rows[0]["questions"] == 3  # the one without an answer is not counted
    assert all(0 <= value <= 1 for row in rows for value in row["measures"].values())
    assert Image.open(picture).size[0] > 500
    table = cembed("eval", causal_bundle, dataset, "--budgets", "1").out
    assert "nDCG@5" in table
    assert "3 questions" in " ".join(table.split())


def test_lists_are_repeated_options_commas_or_both(causal_bundle: Path, dataset: Path) -> None:
    lists = ("--budgets", "8,1", "--budgets", 4, "--storage", "u8", "--storage", "bits, f32")
    rows = json.loads(cembed("eval", causal_bundle, dataset, "--json", *lists).out)["rows"]
    assert [(row["vectors"], row["storage"]) for row in rows if row["part"] == "all"] == [
        (budget, storage) for budget in (1, 4, 8) for storage in ("u8", "bits", "f32")
    ]


def test_a_picture_that_cannot_be_written_costs_no_table(causal_bundle: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "plot.png"
    outcome = cembed("eval", causal_bundle, dataset, "--budgets", "1", "--plot", out)
    assert outcome.status == 1
    assert outcome.err == f"error: cannot write {out}: No such file or directory\n"
    assert "nDCG@5" in outcome.out


def test_pages_in_doubt_are_named(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PageReader.read
    monkeypatch.setattr(
        PageReader, "read", lambda *arguments: (replace(page, warning="half of it") for page in read(*arguments))
    )
    with pytest.warns(RuntimeWarning, match=r"red\.png, page 1: half of it"):
        assert len(list(Dataset.read(dataset).pages())) == 6


DAMAGE = {
    "queries.jsonl, line 1": ("queries.jsonl", '{"text": 3}\n'),
    "an _id comes twice": ("queries.jsonl", 2 * '{"_id": "q0", "text": "a"}\n'),
    "there is no query": ("queries.jsonl", "\n"),
    "the first line must be": ("qrels.tsv", "q0\tred.png\t1\n"),
    "line 2: give a query": ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tred.png\n"),
    "line 3: give a query": ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tred.png\t1\nq0\tred.png\t--5\n"),
    "a query, a page and a whole": ("qrels.tsv", f"query-id\tcorpus-id\tscore\nq0\tred.png\t{'9' * 5000}\n"),
    "field larger than field limit": ("qrels.tsv", f"query-id\tcorpus-id\tscore\nq0\t{'a' * 200_000}\t1\n"),
    "queries.jsonl, line 1: maximum recursion": ("queries.jsonl", "[" * 100_000),
    "judges query 'q9'": ("qrels.tsv", "query-id\tcorpus-id\tscore\nq9\tred.png\t1\n"),
    "names no relevant page": ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tred.png\t0\n"),
    "judges page 'gone.png'": ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tgone.png\t1\n"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_data_set_is_named(causal_bundle: Path, dataset: Path, message: str) -> None:
    name, content = DAMAGE[message]
    (dataset / name).write_text(content)
    assert message in cembed("eval", causal_bundle, dataset).error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budgets", "0"), "num_vectors is 0"),
        (("--budgets", "two"), "give whole numbers"),
        (("--storage", "f8"), "unknown storage 'f8'"),
    ],
)
def test_wrong_flags_are_one_line(causal_bundle: Path, dataset: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in cembed("eval", causal_bundle, dataset, *flags).error


def test_a_folder_without_pages_is_no_data_set(causal_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CembedError, match="has no folder pages"):
        Dataset.read(tmp_path)
