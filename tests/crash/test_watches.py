"""`cembed watch` through kills, and with a ledger that a power cut has left: a part on every run, all with
`make test-crash`. Then moments of it that a kill seldom meets, made for certain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_crash import LONG
from watches import SAMPLE, SETTINGS, Version, draw, pages_of

from cembed.runtime import Embedder, PageReader
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake.folders import Folders
from cembed.runtime.intake.job import LocalPages
from cembed.runtime.intake.ledger import Entry, Ledger, ledger_path
from cembed.runtime.intake.swap import before_path, mend, next_path
from cembed.serve import watcher as watching
from cembed.serve.watcher import LONGEST_PAUSE, Rules, Watcher

RUNS = {
    # name: arguments of the quick part, if there is one, and of the long one
    "plain": [(), ("100",)],
    "mirror": [("3",), ("100",)],
    "moved": [("3",), ("100",)],
    "anew": [("2",), ("60",)],
    "ledgers": [(), ("45",)],
    "stops": [(), ("20",)],
}


@pytest.mark.parametrize("name", RUNS)
def test_what_was_reported_stays_and_in_the_end_all_is_there(name: str) -> None:
    quick, *long = RUNS[name]
    if not (quick or LONG):
        pytest.skip("part of make test-crash")
    for arguments in long if LONG else [quick]:
        script = str(Path(__file__).with_name("watches.py"))
        command = [sys.executable, "-W", "ignore::RuntimeWarning", script, name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, end="")
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def pages() -> Iterator[LocalPages]:
    with PageReader() as reader:
        yield LocalPages(Embedder.load(SAMPLE, threads=1), reader, Budget())


class Desk:
    """Folders, an index and watchers of them, one after the other; `now` is their clock."""

    def __init__(self, root: Path, pages: LocalPages) -> None:
        self.root, self.pages, self.now, self.said = root, pages, 0.0, list[str]()
        for name in ("in", "done", "failed"):
            (root / name).mkdir()
        self.index = Index.create(root / "index", dim=pages.embedder.dim, bundle=pages.bundle)
        self.ledger = Ledger.beside(root / "index", write=True)

    def start(self, **rules: Any) -> Watcher:
        """As after a kill."""
        return Watcher(
            folders=Folders.of([self.root / "in"]),
            rules=Rules(stable_for=1.0, **rules),
            index=self.index,
            pages=self.pages,
            settings=SETTINGS,
            ledger=self.ledger,
            say=self.said.append,
            clock=lambda: self.now,
        )

    def start_moving(self) -> Watcher:
        return self.start(done=self.root / "done", failed=self.root / "failed", once=True)

    def step(self, watcher: Watcher, seconds: float = 10.0) -> None:
        watcher.step()
        self.now += seconds
        watcher.step()

    def put(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*.png")}

    def ids(self) -> set[str]:
        return {page.removeprefix(f"{self.root}/") for page in pages_of(self.root / "index")}


@pytest.fixture
def desk(tmp_path: Path, pages: LocalPages) -> Iterator[Desk]:
    made = Desk(tmp_path, pages)
    yield made
    made.index.close()
    made.ledger.close()


def fail_to_move(path: str, to: str) -> None:
    raise OSError(13, "Permission denied")


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing can be moved, until it is called."""
    monkeypatch.setattr(watching, "move_file", fail_to_move)
    return monkeypatch.undo


def test_a_file_that_changed_since_it_was_read_is_not_moved(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = desk.put("in/a.png", draw("one", 1)), draw("other", 1)
    watcher = desk.start_moving()
    settle = watcher._settle

    def change_and_settle(*arguments: Any) -> list[Entry]:
        path.write_bytes(other)
        monkeypatch.undo()
        return settle(*arguments)

    monkeypatch.setattr(watcher, "_settle", change_and_settle)
    desk.step(watcher)
    assert desk.files() == {"in/a.png": other}
    desk.step(watcher)
    assert desk.files() == {"done/a.png": other}
    assert desk.ids() == {"done/a.png#1"}
    assert desk.index.knows(f"{desk.root}/done/a.png#1", Version.of(other, 1).content(1))


def test_a_copy_takes_nothing_from_a_file_that_is_to_be_moved(desk: Desk, stuck: Callable[[], None]) -> None:
    desk.put("in/a.png", draw("one", 1))
    watcher = desk.start_moving()
    desk.step(watcher)
    desk.put("in/b.png", draw("one", 1))
    desk.step(watcher)
    assert desk.ids() == {"done/a.png#1", "done/b.png#1"}
    stuck()
    desk.step(watcher, 100.0)
    assert desk.files().keys() == {"done/a.png", "done/b.png"}
    assert desk.ids() == {"done/a.png#1", "done/b.png#1"}
    assert desk.ledger.counts() == {"indexed": 2}


def test_a_bad_file_that_was_moved_is_still_bad_after_a_kill(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.put("in/a.png", b"no picture")
    watcher = desk.start_moving()
    monkeypatch.setattr(watcher, "_note_moved", lambda entry: None)
    desk.step(watcher, 0.5)
    desk.now += 1.0
    watcher.step()
    desk.start_moving()
    [entry] = desk.ledger.entries("failed")
    assert (entry.path, desk.ledger.counts()) == (f"{desk.root}/failed/a.png", {"failed": 1})


def test_a_good_file_in_the_place_of_a_bad_one_goes_to_the_good_ones(desk: Desk, stuck: Callable[[], None]) -> None:
    desk.put("in/a.png", b"no picture")
    desk.step(desk.start_moving())
    desk.put("in/a.png", draw("good", 1))
    stuck()
    desk.step(desk.start_moving(), 100.0)
    assert desk.files().keys() == {"done/a.png"}
    assert desk.ids() == {"done/a.png#1"}


def test_a_file_that_changed_does_not_go_where_its_double_is(desk: Desk, stuck: Callable[[], None]) -> None:
    one, two = draw("one", 1), draw("two", 1)
    desk.put("done/a.png", one)
    desk.put("in/a.png", one)
    desk.step(desk.start_moving())
    desk.put("in/a.png", two)
    stuck()
    desk.step(desk.start_moving(), 100.0)
    assert desk.files() == {"done/a.png": one, "done/a (2).png": two}


def test_an_empty_folder_is_not_believed_where_the_ledger_was_lost(desk: Desk) -> None:
    for name in "abc":
        desk.put(f"in/{name}.png", draw(name, 1))
    desk.step(desk.start(mirror=True))
    desk.ledger.close()
    ledger_path(desk.root / "index").unlink()
    desk.ledger = Ledger.beside(desk.root / "index", write=True)
    os.rename(desk.root / "in", desk.root / "elsewhere")
    (desk.root / "in").mkdir()
    watcher = desk.start(mirror=True)
    desk.step(watcher)
    assert (len(desk.index), list(watcher.troubles)) == (3, [f"{desk.root}/in"])
    (desk.root / "in").rmdir()
    os.rename(desk.root / "elsewhere", desk.root / "in")
    (desk.root / "in" / "a.png").unlink()
    desk.step(watcher)
    desk.step(watcher)
    assert desk.ids() == {"in/b.png#1", "in/c.png#1"}


def test_an_index_of_pages_that_are_lost_is_not_taken_for_another(tmp_path: Path) -> None:
    """It was begun to be made anew with another bundle, and then not."""
    index = tmp_path / "index"
    for path, bundle in ((index, "a"), (next_path(index), "b"), (before_path(index), "lost")):
        Index.create(path, dim=64, bundle=bundle).close()
    mend(index, "a")
    assert {path.name: Index.open(path).bundle for path in tmp_path.iterdir()} == {"index": "a", "index.before": "lost"}


def test_a_file_that_is_locked_for_weeks(desk: Desk, stuck: Callable[[], None]) -> None:
    path = str(desk.put("in/a.png", draw("one", 1)))
    watcher = desk.start_moving()
    desk.step(watcher)
    watcher.pending[path] = replace(watcher.pending[path], tries=5000, retry_at=0.0)
    watcher._put_off(path, "locked")
    assert watcher.pending[path].retry_at == desk.now + LONGEST_PAUSE


def test_a_file_that_vanishes_before_it_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.put("in/a.png", draw("one", 1))
    watcher = desk.start()
    watcher.step()
    desk.now += 10.0
    take = watcher._take

    def vanish_and_take(paths: Sequence[str]) -> None:
        path.unlink(missing_ok=True)
        monkeypatch.undo()
        take(paths)

    monkeypatch.setattr(watcher, "_take", vanish_and_take)
    watcher.step()
    assert not watcher.pending


def test_nothing_is_tried_again_at_once(desk: Desk, stuck: Callable[[], None]) -> None:
    path = str(desk.put("in/a.png", draw("one", 1)))
    watcher = desk.start_moving()
    watcher.rules = replace(watcher.rules, stable_for=0.0)
    watcher.step()
    assert watcher.pending[path].tries == 1


@pytest.mark.parametrize("table", ["files", "contents"])
def test_a_ledger_that_is_damaged_while_it_is_used_is_made_anew(desk: Desk, table: str) -> None:
    path = str(desk.put("in/a.png", draw("one", 1)))
    desk.step(desk.start())
    digest = desk.ledger.entries("indexed")[0].digest
    desk.ledger._database.execute(f"UPDATE {table} SET told = '{{'")
    with pytest.raises(CembedError, match="cannot read"):
        desk.ledger.get(path) if table == "files" else desk.ledger.content(digest)
    desk.ledger.close()
    desk.ledger = Ledger.beside(desk.root / "index", write=True)
    watcher = desk.start()
    desk.step(watcher)
    assert (desk.ledger.counts(), watcher.tally.added) == ({"indexed": 1}, 0)
