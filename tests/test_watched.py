"""Watching as users start it: the commands, a server that watches, and another bundle that comes meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import SAMPLE, Server, sample_pages
from test_cli import Outcome, cembed

from cembed.runtime import Bundle, Embedder, NewPage
from cembed.runtime.index.index import Index
from cembed.runtime.intake import swap
from cembed.runtime.intake.sources import Sources
from cembed.runtime.pages.documents import PageReader
from cembed.runtime.writer import write_self_test
from cembed.serve.notify import Notifier

SECONDS = 120.0
QUICK = ("--stable-for", "0.1", "--every", "0.2")


class Command(Server):
    """A command that goes on, as users start it."""

    def __init__(self, log: Path, *arguments: object, **environment: str) -> None:
        self.log = log
        code = "from cembed.cli import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, **environment})

    def serving(self) -> Command:
        """Once it is ready."""
        wait_for(lambda: '"ready": true' in self.log.read_text(), self.log)
        self.port = int(self.log.read_text().partition(" at http://")[2].split()[0].rpartition(":")[2])
        return self


def wait_for(condition: Callable[[], Any], log: Path | None = None) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, log and log.read_text()
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample bundle with other vectors, by another hash."""
    root = Path(shutil.copytree(SAMPLE, tmp_path_factory.mktemp("other") / "bundle"))
    manifest = Bundle(SAMPLE).manifest
    prompt = manifest.document.prompt.replace("{image}", "{image}Page")
    write_self_test(root, replace(manifest, document=replace(manifest.document, prompt=prompt)))
    return root


@pytest.fixture
def link(tmp_path: Path) -> Path:
    (tmp_path / "current").symlink_to(SAMPLE)
    return tmp_path / "current"


def lead_to(link: Path, bundle: Path) -> None:
    link.with_name("next").symlink_to(bundle)
    link.with_name("next").rename(link)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for path in sample_pages(3):
        shutil.copy(path, tmp_path / "in")
    return tmp_path / "in"


def status(index: Path) -> tuple[int, dict[str, Any]]:
    outcome = cembed("status", index, "--json")
    return outcome.status, json.loads(outcome.out)


def sources(index: Path) -> set[str]:
    there = (index / "CURRENT").exists()
    return {os.path.basename(page.source) for page in Index.open(index).find()} if there else set()


def is_of(index: Path, bundle: Path) -> bool:
    """Whether the index has the vectors that this bundle makes."""
    embedder, opened = Embedder.load(bundle), Index.open(index)
    page = opened.find()[0]
    with PageReader() as reader:
        image = next(iter(reader.read([page.source]))).image  # type: ignore[union-attr]
    cosines = (opened.vectors(page.id) * embedder.embed_image(image)).sum(axis=1)
    return opened.bundle == Bundle(bundle).hash and bool(np.all(cosines > 0.99))


# The command --------------------------------------------------------------------------------------------------------


def watch_once(folder: Path, index: Path, bundle: Path, *options: object) -> Outcome:
    return cembed("watch", folder, "--index", index, "--bundle", bundle, "--once", *QUICK, *options)


def test_one_pass(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    outcome = watch_once(folder, index, SAMPLE)
    assert (outcome.status, outcome.out) == (3, f"{index}: 3 pages added; 1 could not be read\n")
    assert outcome.err.startswith(f"not embedded: {folder}/bad.pdf: ")
    again = watch_once(folder, index, SAMPLE)
    assert again == Outcome(0, f"{index}: 0 pages added\n", "")
    code, found = status(index)
    assert (code, found["state"], found["pages"]) == (3, "some files failed", 3)
    assert found["files"] == {"failed": 1, "indexed": 3}
    assert [file["path"] for file in found["failed"]] == [f"{folder}/bad.pdf"]
    table = cembed("status", index)
    assert "bad.pdf" in table.out
    assert "3, 0 with a warning" in table.out
    (folder / "bad.pdf").unlink()
    assert watch_once(folder, index, SAMPLE, "--mirror").status == 0
    assert status(index)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mirror", "--move-done", "done"), "choose one of them"),
        (("--dim", "4096"), "dim is 4096"),
    ],
)
def test_options_that_cannot_be(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    outcome = watch_once(folder, tmp_path / "index", SAMPLE, *options)
    assert (outcome.status, message in outcome.err) == (1, True)
    assert not (tmp_path / "index").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is no folder" in watch_once(tmp_path / "file", tmp_path / "index", SAMPLE).error.replace("\n", "")


def test_a_folder_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    outcome = cembed(
        "watch", folder, tmp_path / "none", "--index", tmp_path / "i", "--bundle", SAMPLE, "--once", *QUICK
    )
    assert (outcome.status, outcome.err) == (3, f"{tmp_path}/none: No such file or directory\n")
    assert outcome.out.endswith("3 pages added\n")


def test_another_process_writes(folder: Path, tmp_path: Path) -> None:
    with Index.create(tmp_path / "index", dim=Embedder.load(SAMPLE).dim, bundle=Bundle(SAMPLE).hash):
        assert "another process is writing" in watch_once(folder, tmp_path / "index", SAMPLE).err


def test_index_add_shares_what_is_known(folder: Path, tmp_path: Path) -> None:
    """A bad file fails once, and a file that was moved has one path, whichever command is used."""
    index, command = tmp_path / "index", ("index", "add", tmp_path / "index", folder, "--bundle", SAMPLE)
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    assert cembed(*command).status == 3
    first = sample_pages(1)[0].name
    (folder / first).rename(folder / "moved.jpg")
    outcome = cembed(*command)
    assert (outcome.status, outcome.err) == (0, "")
    assert "1 files moved" in outcome.out
    assert "1 could not be read before" in outcome.out
    assert first not in sources(index)
    assert "moved.jpg" in sources(index)
    again = cembed(*command, "--retry-failed")
    assert (again.status, "bad.pdf" in again.err) == (3, True)
    assert watch_once(folder, index, SAMPLE).out == f"{index}: 0 pages added\n"


def test_it_watches_until_it_is_told_to_stop(folder: Path, tmp_path: Path) -> None:
    index, log = tmp_path / "index", tmp_path / "log"
    with Command(log, "watch", folder, "--index", index, "--bundle", SAMPLE, *QUICK) as watching:
        wait_for(lambda: len(sources(index)) == 3, log)
        shutil.copy(sample_pages(4)[3], folder / "new.jpg")
        wait_for(lambda: "new.jpg" in sources(index), log)
        code, found = status(index)
        assert (code, found["trouble"]) == (0, [])
        assert str(watching.process.pid) in found["watcher"]
        shutil.move(folder, tmp_path / "away")
        wait_for(lambda: status(index)[1]["trouble"], log)
        assert status(index)[0] == 1
        shutil.move(tmp_path / "away", folder)
        wait_for(lambda: status(index)[0] == 0, log)
        watching.process.send_signal(signal.SIGTERM)
        assert watching.process.wait(60) == 128 + signal.SIGTERM
    assert log.read_text().splitlines()[-2:] == [f"{index}: 4 pages added", "interrupted"]
    assert "ended" in status(index)[1]["watcher"]


def test_status_of_a_watcher_that_was_killed(folder: Path, tmp_path: Path) -> None:
    index, log = tmp_path / "index", tmp_path / "log"
    with Command(log, "watch", folder, "--index", index, "--bundle", SAMPLE, *QUICK) as watching:
        wait_for(lambda: len(sources(index)) == 3, log)
        wait_for(lambda: status(index)[1]["watcher"], log)
        watching.stop(signal.SIGKILL)
    time.sleep(1.1)
    outcome = cembed("status", index, "--stale-after", "1")
    assert outcome.status == 1
    assert "no sign of life" in outcome.out


def test_what_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "socket"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        notifier = Notifier()
        notifier.ready()
        notifier.alive()
        notifier.alive()
        notifier.status("1 files wait")
        notifier.status("1 files wait")
        notifier.stopping()
        said = [listening.recv(100).decode() for _ in range(4)]
    assert said == ["READY=1", "WATCHDOG=1", "STATUS=1 files wait", "STOPPING=1"]
    assert "NOTIFY_SOCKET" not in os.environ


# Another bundle -----------------------------------------------------------------------------------------------------


def test_another_bundle_is_refused_without_reembed(folder: Path, tmp_path: Path, link: Path, other: Path) -> None:
    index, log = tmp_path / "index", tmp_path / "log"
    with Command(log, "watch", folder, "--index", index, "--bundle", link, *QUICK):
        wait_for(lambda: len(sources(index)) == 3, log)
        lead_to(link, other)
        wait_for(lambda: "cannot be used" in log.read_text(), log)
        shutil.copy(sample_pages(4)[3], folder / "new.jpg")
        wait_for(lambda: "new.jpg" in sources(index), log)
        wait_for(lambda: "--reembed" in str(status(index)[1]["trouble"]), log)
    assert Index.open(index).bundle == Bundle(SAMPLE).hash
    outcome = watch_once(folder, index, link)
    assert (outcome.status, "--reembed" in outcome.err) == (1, True)


@pytest.mark.parametrize("exchange", [True, False])
def test_an_index_is_made_anew(
    folder: Path, tmp_path: Path, other: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all of its files, also those that are not in the folders; names and metadata stay."""
    index, outside = tmp_path / "index", tmp_path / "outside.jpg"
    shutil.copy(sample_pages(5)[4], outside)
    watch_once(folder, index, SAMPLE, "--metadata", "year=2024")
    cembed("index", "add", index, outside, "--bundle", SAMPLE, "--metadata", "year=1999")
    if not exchange:
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    outcome = watch_once(folder, index, other, "--reembed")
    assert outcome.status == 0
    assert is_of(index, other)
    years = {os.path.basename(page.source): page.metadata["year"] for page in Index.open(index).find()}
    assert years == {**dict.fromkeys([path.name for path in sample_pages(3)], 2024), "outside.jpg": 1999}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("index")) == [
        "index",
        "index.ledger",
    ]
    assert watch_once(folder, index, other).out == f"{index}: 0 pages added\n"


def test_pages_whose_files_are_gone_are_kept_with_the_old_index(folder: Path, tmp_path: Path, other: Path) -> None:
    index = tmp_path / "index"
    watch_once(folder, index, SAMPLE)
    gone = sample_pages(1)[0].name
    (folder / gone).unlink()
    outcome = watch_once(folder, index, other, "--reembed")
    assert f"1 pages of the old index are not in it, such as {folder}/{gone}#1" in outcome.err
    assert gone not in sources(index)
    assert gone in sources(tmp_path / "index.before")


# The server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(bundle: Path, *arguments: object) -> Command:
        command = ("serve", bundle, "--port", 0, *arguments)
        started.append(Command(tmp_path / "log", *command))
        return started[-1].serving()

    yield start
    for server in started:
        server.stop()


def found(server: Command, query: str = "invoice") -> list[str]:
    answer = server.get(f"/search?q={query}&top=20")
    return [page["source"] for page in answer.json["pages"]] if answer.status == 200 else []


def model(server: Command) -> str:
    return server.get("/metrics").body.decode().partition('bundle="')[2].partition('"')[0]


def test_a_server_that_watches(folder: Path, tmp_path: Path, serve: Callable[..., Command]) -> None:
    index = tmp_path / "index"
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    server = serve(SAMPLE, "--index", index, "--watch", folder, "--mirror", *QUICK)
    names = {path.name for path in sample_pages(3)}
    wait_for(lambda: set(found(server)) == names, server.log)
    sent = server.post("/pages?name=sent.jpg", sample_pages(4)[3].read_bytes())
    assert (sent.status, "sent.jpg" in found(server)) == (200, True)
    (folder / min(names)).unlink()
    wait_for(lambda: min(names) not in found(server), server.log)
    assert "sent.jpg" in found(server)  # which was in no folder
    picture = next(page for page in server.get("/search?q=a&top=20").json["pages"] if page["source"] == max(names))
    assert server.get(f"/pages/{picture['id']}/thumbnail").headers["content-type"] == "image/jpeg"
    wait_for(lambda: status(index)[1]["files"].get("failed") == 1, server.log)
    assert is_of(index, SAMPLE)


def test_vectors_of_a_server_are_those_of_the_command(
    folder: Path, tmp_path: Path, serve: Callable[..., Command]
) -> None:
    server = serve(SAMPLE, "--index", tmp_path / "a", "--watch", folder, "--threads", 1, *QUICK)
    wait_for(lambda: len(found(server)) == 3, server.log)
    watch_once(folder, tmp_path / "b", SAMPLE, "--threads", 1)
    a, b = Index.open(tmp_path / "a"), Index.open(tmp_path / "b")
    assert all(np.array_equal(a.vectors(page.id), b.vectors(page.id)) for page in b.find())


def test_a_server_takes_another_bundle(tmp_path: Path, link: Path, other: Path, serve: Callable[..., Command]) -> None:
    """Between two requests: none fails."""
    server = serve(link)
    assert server.get("/v1/models").json["data"][0]["id"] == tmp_path.name
    lead_to(link, other)
    while model(server) != Bundle(other).hash:
        assert server.post("/embed", "query").status == 200
    page = sample_pages(1)[0]
    vectors = np.frombuffer(server.post("/embed", page.read_bytes()).body, np.float32)
    with PageReader() as reader:
        image = next(iter(reader.read([page]))).image  # type: ignore[union-attr]
    expected = Embedder.load(other).embed_image(image)
    assert (vectors.reshape(expected.shape) * expected).sum(axis=1).min() > 0.99


def test_a_server_refuses_a_bundle_that_its_index_is_not_of(
    folder: Path, tmp_path: Path, link: Path, other: Path, serve: Callable[..., Command]
) -> None:
    index = tmp_path / "index"
    watch_once(folder, index, SAMPLE)
    server = serve(link, "--index", index)
    lead_to(link, other)
    wait_for(lambda: "cannot be used" in server.log.read_text(), server.log)
    assert model(server) == Bundle(SAMPLE).hash
    assert len(found(server)) == 3


def test_a_server_makes_its_index_anew(
    folder: Path, tmp_path: Path, link: Path, other: Path, serve: Callable[..., Command]
) -> None:
    """Searches go on meanwhile, first with the old one and then with the new."""
    index = tmp_path / "index"
    server = serve(link, "--index", index, "--watch", folder, "--reembed", *QUICK)
    wait_for(lambda: len(found(server)) == 3, server.log)
    lead_to(link, other)
    while model(server) != Bundle(other).hash:
        assert len(found(server)) == 3
    assert len(found(server)) == 3
    assert is_of(index, other)
    shutil.copy(sample_pages(4)[3], folder / "new.jpg")
    wait_for(lambda: "new.jpg" in found(server), server.log)


def test_what_clients_name_is_never_read(
    folder: Path,
    tmp_path: Path,
    link: Path,
    other: Path,
    serve: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the index is made anew from its files: one that was sent has none, though a file has its name."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in (tmp_path / "secret.jpg", tmp_path / "work" / "secret.jpg"):
        shutil.copy(sample_pages(5)[4], place)
    sent, index = sample_pages(4)[3].read_bytes(), tmp_path / "index"
    server = serve(link, "--index", index, "--watch", folder, "--reembed", *QUICK)
    wait_for(lambda: len(found(server)) == 3, server.log)
    names = ("/../secret.jpg", "../secret.jpg", "work/../../secret.jpg", "secret.jpg", "../work/secret.jpg")
    assert [server.post(f"/pages?name={name}", sent).status for name in names] == [400, 400, 400, 200, 400]
    lead_to(link, other)
    wait_for(lambda: model(server) == Bundle(other).hash, server.log)
    assert sorted(found(server)) == [path.name for path in sample_pages(3)]
    assert "secret.jpg#1" in server.log.read_text()  # it is only in the old index


def test_a_relative_source_of_no_known_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("sent.jpg", "added.jpg", "up.jpg"):
        (tmp_path / name).touch()
        (tmp_path / "work" / name).touch()
    vectors, folder = np.ones((1, 8), np.float32), str(tmp_path)
    pages = [NewPage("1", vectors, "sent.jpg"), NewPage("2", vectors, "../up.jpg")]
    with Index.create(tmp_path / "index", dim=8, bundle="0" * 64) as index:
        index.add([*pages, NewPage("3", vectors, "added.jpg", folder=folder)], bundle="0" * 64)
        found = Sources(index)
    assert found.files() == [f"{folder}/added.jpg"]
    assert found.below(folder) == ["added.jpg"]


def test_a_reading_server_goes_along(
    folder: Path, tmp_path: Path, link: Path, other: Path, serve: Callable[..., Command]
) -> None:
    """With an index that another process makes anew."""
    index = tmp_path / "index"
    watch_once(folder, index, SAMPLE)
    server = serve(link, "--index", index, "--read-only")
    lead_to(link, other)
    time.sleep(2)
    assert (model(server), len(found(server))) == (Bundle(SAMPLE).hash, 3)
    assert watch_once(folder, index, link, "--reembed").status == 0
    while model(server) != Bundle(other).hash:
        assert len(found(server)) == 3
    assert len(found(server)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mirror",), "give --watch FOLDER"),
        (("--watch", "."), "give --index INDEX"),
        (("--watch", ".", "--index", "i", "--read-only"), "without --read-only"),
    ],
)
def test_options_of_a_server_that_cannot_be(options: tuple[str, ...], message: str) -> None:
    assert message in cembed("serve", SAMPLE, "--port", 0, *options).error
