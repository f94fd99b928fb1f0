"""The sample pages and the training recipe: what is drawn is what is asked, training learns.

Faces come from matplotlib's own folder here, so that no Debian package is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
import pytest
import torch

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.runtime import Embedder
from cembed.runtime.evaluate import Dataset

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
sys.path[:0] = [str(SAMPLES / "pages"), str(SAMPLES / "train")]
import data  # noqa: E402
import distil  # noqa: E402
import fonts  # noqa: E402
import generate  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
import vocabulary  # noqa: E402
import words  # noqa: E402
import write  # noqa: E402

DIMS = model.Dims(64, 2, 2, 1, 96, 700, 32, 2, 2, 64)


@pytest.fixture(scope="module", autouse=True)
def own_faces() -> object:
    """Faces that pip installs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fonts, "FOLDER", Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    patch.setattr(fonts, "TRAINED", {"matplotlib": "DejaVuSans DejaVuSans-Bold DejaVuSerif STIXGeneral"})
    patch.setattr(fonts, "HELD_OUT", {"matplotlib": "DejaVuSansMono DejaVuSans-Oblique"})
    fonts.installed.cache_clear()
    fonts.faces.cache_clear()
    yield
    patch.undo()
    fonts.installed.cache_clear()
    fonts.faces.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "PAGES", 40)
        vocabulary.write_tokenizer(path, DIMS.vocab)
    return path


@pytest.mark.parametrize("part", generate.KINDS)
def test_every_kind_of_page_bears_what_is_asked(part: generate.Part) -> None:
    seen = set()
    for index in range(110):
        page = generate.make_page(f"a{index}", "train", part)
        seen.add(page.kind)
        assert page.questions
        assert all(page.answers(question) for question in page.questions)
        assert page.image.width % 112 == page.image.height % 112 == 0
    assert seen == {layout.__name__ for layout in generate.KINDS[part]}


def test_a_seed_gives_the_same_page() -> None:
    first, again, other = (generate.make_page(seed, "test") for seed in ("x", "x", "y"))
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions
    assert first.image.size != other.image.size or not np.array_equal(first.image, other.image)


def test_characters_are_where_they_are_said_to_be() -> None:
    """Around each character of a page without noise there is ink; beside the words there is paper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "scan", lambda image, random: image)
        pages = [generate.make_page(f"marks{n}", "train") for n in range(10)]
    for page in pages:
        grey = np.asarray(page.image.convert("L"), np.float32)
        contrasts = []
        for word in page.words:
            for mark in word.characters:
                if mark.text.isalpha():
                    x, y = round(mark.x), round(mark.y)
                    patch_ = grey[max(0, y - 6) : y + 7, max(0, x - 4) : x + 5]
                    contrasts.append(np.ptp(patch_) if patch_.size else 0)
        assert np.mean(np.array(contrasts) > 25) > 0.97, page.kind


def test_splits_share_no_content() -> None:
    random = Random(0)
    makers = (words.person, words.company, words.product, words.topic, words.event, words.dish)
    made = {s: {maker(random, s) for maker in makers for _ in range(300)} for s in ("train", "validation", "test")}
    assert not made["train"] & made["test"]
    assert not made["train"] & made["validation"]
    assert not made["test"] & made["validation"]


def test_a_data_set_is_read_by_eval_and_judged_by_content(tmp_path: Path) -> None:
    generate.write_dataset(tmp_path / "set", "test", 24)
    dataset = Dataset.read(tmp_path / "set")
    assert len(dataset.judged()) == 24
    assert len(list((tmp_path / "set" / "pages").iterdir())) == 24
    assert set(dataset.parts.values()) == {"seen", "unseen"}
    pages = list(generate.make_pages("test", 24))
    for index, query in enumerate(dataset.queries):
        question = next(q for q in pages[index].questions if q.text == dataset.queries[query])
        right = {f"{n:05}.jpg" for n, page in enumerate(pages) if page.answers(question)}
        assert right == dataset.qrels[query].keys()


def test_missing_fonts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "TRAINED", {"fonts-nowhere": "Nowhere-Regular"})
    fonts.faces.cache_clear()
    with pytest.raises(fonts.MissingFontsError, match="apt-get install fonts-nowhere"):
        fonts.faces(False)
    fonts.faces.cache_clear()


def test_pieces_stand_where_words_end(tokenizer: Path) -> None:
    reader = data.Reader(tokenizer)
    page = generate.make_page("pieces", "train")
    example = reader.read(page, Random(0))
    found = {int(token) for token in example.pieces.flatten() if token != data.NONE}
    expected = {t for word in page.vocabulary if word for t, _ in reader.tokens(word)}
    assert len(found & expected) >= 0.8 * len(expected)  # the others share a spot with too many, or are off the page
    assert found <= expected
    assert set(example.keys[example.keys != data.NONE]) <= expected


STAGES = (train.Stage("letters", "walls", 60, 4, 1.0),)
ALL_STAGES = (
    train.Stage("letters", "walls", 2, 2, 1.0),
    train.Stage("words", "walls", 2, 2, 1.0, decoder=True),
    train.Stage("pages", "seen", 2, 3, 1.0, decoder=True, heads=True),
    train.Stage("holes", "seen", 2, 3, 1.0, decoder=True, heads=True, holes="mixed"),
)


def run(out: Path, tokenizer: Path, stages: tuple[train.Stage, ...]) -> list[dict[str, float]]:
    torch.manual_seed(0)
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    trainer = train.Trainer(DIMS, tokenizer, compiled=False)
    train.train(trainer, out, tokenizer, stages, data.batches)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_learns_to_read(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 steps of 4 pages: the loss of the last ten steps is under 0.85 of that of the first ten."""
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "WARMUP", 5)
    log = run(tmp_path / "run", tokenizer, STAGES)
    assert len(log) == 6
    assert log[-1]["reading"] < 0.85 * log[0]["reading"], [row["reading"] for row in log]


def test_training_resumes_at_the_step_it_was_saved(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages; a run that is there already does nothing, and a loaded state is the saved one, optimisers too."""
    monkeypatch.setattr(train, "CHUNK", 100_000)
    out = tmp_path / "run"
    log = run(out, tokenizer, ALL_STAGES)
    assert [row["stage"] for row in log] == ["letters", "words", "pages", "holes"]
    assert {f"{head}.contrast" for head in model.HEADS} <= log[-1].keys()
    assert all(np.isfinite(value) for row in log for value in row.values() if isinstance(value, float))
    assert max(chunk.stat().st_size for chunk in (out / "state").iterdir()) <= 100_000
    trainer = train.Trainer(DIMS, tokenizer, compiled=False)
    assert trainer.load(out) == 8
    assert any(torch.count_nonzero(s["momentum_buffer"]) for s in trainer.optimizers[0][0].state.values())
    assert run(out, tokenizer, ALL_STAGES) == log


def test_training_goes_on_from_a_checkpoint(trained: Path, tokenizer: Path, tmp_path: Path) -> None:
    """What is written, and the rest beside it, is all of a model, to bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", lambda _, path, compiled: Trainer(DIMS, path, compiled))
        write.main(trained, tmp_path, ["causal"])
    old, new = (train.Trainer(DIMS, tokenizer, compiled=False) for _ in range(2))
    old.load(trained)
    write.read_checkpoint(new.master, tmp_path / "causal")
    for (name, a), b in zip(old.master.named_parameters(), new.master.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0.01, atol=1e-6), name


def test_pages_with_holes_come_nearer_to_whole_ones(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 steps take causal vectors to 0.8 of the distance from those that the model gave of whole pages; the vision
    tower stays."""
    monkeypatch.setattr(distil, "LOG_EVERY", 10)
    torch.manual_seed(0)
    tiny = model.SampleModel(DIMS, tokenizer)
    before = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    distil.distil(tiny, data.batches(tokenizer, "varied", 3, "distil", "runtime"), 40, tmp_path / "log", rate=1e-3)
    first, *_, last = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert last["causal"] < 0.8 * first["causal"]
    changed = {name.split(".")[0] for name, value in tiny.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"decoder"}


Trainer = train.Trainer


@pytest.fixture(scope="module")
def trained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("trained") / "run"
    run(out, tokenizer, ALL_STAGES)
    return out


def test_holes_side_by_side_are_holes_that_are_masked(trained: Path, tokenizer: Path) -> None:
    """What is distilled is computed as the runtime does; training before left the places empty."""
    trainer = train.Trainer(DIMS, tokenizer, compiled=False)
    trainer.load(trained)
    batch = next(data.batches(tokenizer, "varied", 3, "holes", "runtime"))
    read = torch.from_numpy(batch.read)
    assert len(set(read.sum(1).tolist())) > 1
    with torch.no_grad():
        seen = trainer.master.see(torch.from_numpy(batch.patches), read, batch.size)
        prompt = trainer.master.document_prompt(seen, read, batch.size)
        closed, places = distil.without_holes(prompt)
        expected, found = (
            trainer.master.embed(trainer.master.prefill(p), "document", feedback=True) for p in (prompt, closed)
        )
    expected["colbert"] = expected["colbert"].gather(1, places[..., None].expand(-1, -1, model.PROJECTION))
    expected["colbert"] = expected["colbert"] * closed.there[..., None]
    for head in model.HEADS:
        torch.testing.assert_close(found[head], expected[head], atol=1e-5, rtol=0, msg=head)


@pytest.mark.parametrize("head", model.HEADS)
def test_an_exported_head_gives_the_vectors_it_was_trained_with(
    head: str, trained: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Training runs windows and heads side by side; the bundle runs the exporter's graphs. Page and query, to 1e-5."""
    trainer = train.Trainer(DIMS, tokenizer, compiled=False)
    trainer.load(trained)
    write.write_checkpoint(trainer.master, head, tmp_path / "checkpoint")
    positions = None if head == "colbert" else "continue"
    budgets = [model.FEEDBACK[side] + 1 for side in ("document", "query")] if head == "feedback" else (None, None)
    options = ExportOptions(
        "qwen2.5-vl",
        str(tmp_path / "checkpoint"),
        head=head,
        slot_positions=positions,
        num_vectors=budgets[0],
        query_vectors=budgets[1],
    )
    export(options, tmp_path / "bundle")
    embedder = Embedder.load(tmp_path / "bundle")
    page = generate.make_page("paper", "validation")
    text = page.questions[0].text
    with torch.no_grad():
        for parameter in trainer.master.parameters():  # as they are stored
            parameter.copy_(parameter.to(torch.bfloat16).float())
        prompts = {
            "document": trainer.master.page_prompt(page.image),
            "query": trainer.master.query_prompt([text, "a longer one beside it, so that it is filled up"]),
        }
        vectors = {
            side: trainer.master.embed(trainer.master.prefill(prompt), side, feedback=head == "feedback")[head][0]
            for side, prompt in prompts.items()
        }
    found = embedder.embed_images([page.image])[0]
    assert np.abs(found - vectors["document"].numpy()).max() < 1e-5
    found = embedder.embed_queries([text])[0]
    assert np.abs(found - vectors["query"][: len(found)].numpy()).max() < 1e-5
    with torch.no_grad():
        prefix = trainer.master.prefill(trainer.master.page_prompt(page.image, skip_blank=True))
        expected = trainer.master.embed(prefix, "document", feedback=head == "feedback")[head][0]
    if head == "colbert":
        expected = expected[prefix.prompt.there[0]]
    found = Embedder.load(tmp_path / "bundle", skip_blank=True).embed_images([page.image])[0]
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert not prefix.prompt.there.all()


def test_margins_reward_vectors_that_tell_pages_apart() -> None:
    """Cosines [2, 2, 1, 2]: each further vector raises the right page's score, or the wrong page's."""
    right, wrong = [0.2, 0.9], [0.2, 0.2]
    good = torch.tensor([[[right], [wrong]], [[wrong], [right]]])
    bad = torch.tensor([[[wrong], [right]], [[right], [wrong]]])
    assert losses.margins(good).item() == pytest.approx(-(0.9 - 0.2) / 2)
    assert losses.margins(bad).item() == pytest.approx((0.9 - 0.2) / 2)


def test_diversity_is_the_mean_squared_cosine_of_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(q[a] @ q[b]) ** 2 for q in rows for a in range(4) for b in range(4) if a != b]
    assert losses.diversity(rows).item() == pytest.approx(np.mean(pairs), rel=1e-5)
