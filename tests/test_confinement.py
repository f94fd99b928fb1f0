"""What a server and a watcher give up of themselves, and that they can do all that they should without it."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from serving import SAMPLE, Server, sample_pages
from test_watched import QUICK, Command, lead_to, wait_for
from test_watched import link as link
from test_watched import other as other

from cembed.runtime import Bundle, landlock
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.serve.confinement import confine

ATTEMPTS = """
import json, os, socket, subprocess, sys
from pathlib import Path
def outcome(attempt):
    try:
        attempt()
        return "done"
    except OSError as error:
        return type(error).__name__
def connect(family, address):
    with socket.socket(family) as made:
        made.connect(address)
def send(port):
    with socket.socket(type=socket.SOCK_DGRAM) as made:
        made.sendto(b"a", ("127.0.0.1", port))
def listen():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
def attempts(bundle, room, port):
    return {name: outcome(attempt) for name, attempt in {
        "read the bundle": (bundle / "manifest.json").read_bytes,
        "write into the bundle": lambda: (bundle / "new").write_text(""),
        "change the bundle": lambda: open(bundle / "manifest.json", "r+").close(),
        "remove from the bundle": (bundle / "manifest.json").unlink,
        "read what is read": (room / "reads" / "a").read_bytes,
        "change what is read": lambda: (room / "reads" / "a").write_text(""),
        "write what is written": lambda: (room / "writes" / "a").write_text(""),
        "move what is written": lambda: os.rename(room / "writes" / "a", room / "writes" / "b"),
        "read another file": (room / "other" / "a").read_bytes,
        "write another file": lambda: (room / "other" / "b").write_text(""),
        "list another folder": lambda: os.listdir(room / "other"),
        "leave a link to another file": lambda: os.link(room / "other" / "a", room / "writes" / "c"),
        "read /etc/shadow": Path("/etc/shadow").read_bytes,
        "read the memory of its parent": lambda: open(f"/proc/{os.getppid()}/mem", "rb"),
        "end its parent": lambda: os.kill(os.getppid(), 0),
        "run a program": lambda: subprocess.run(["/bin/true"]),
        "run Python": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        "connect to a UNIX socket": lambda: connect(socket.AF_UNIX, str(room / "socket")),
        "send by UDP": lambda: send(port),
        "change the mode of a file": lambda: os.chmod(room / "other" / "a", 0o666),
        "change the times of a file": lambda: os.utime(room / "other" / "a"),
        "change the owner of a file": lambda: os.chown(room / "other" / "a", os.getuid(), os.getgid()),
        "note something at a file": lambda: os.setxattr(room / "reads" / "a", "user.a", b"a"),
        "cut a file": lambda: os.truncate(room / "reads" / "a", 0),
        "list the working directory": lambda: os.listdir("."),
        "connect": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        "listen": listen,
    }.items()}
"""
WORKER = """
import types
from cembed import serve
from cembed.serve import boot
serve.worker = sys.modules["cembed.serve.worker"] = types.ModuleType("worker")
serve.worker.main = lambda: print(json.dumps(attempts(bundle, room, port)))
boot.main()
"""
SERVER = """
from cembed.runtime.landlock import CONNECT
from cembed.serve.confinement import confine, readable, written
confine(readable(bundle, room / "reads"), written(room / "writes" / "index"), CONNECT)
print(json.dumps(attempts(bundle, room, port)))
"""
FREE = "print(json.dumps(attempts(bundle, room, port)))"
DONE = {"read the bundle", "read what is read", "run Python"}
WRITTEN = {"write what is written", "move what is written"}
LEFT = {"connect to a UNIX socket", "send by UDP", "change the mode of a file", "change the times of a file",
        "change the owner of a file"}  # fmt: skip
"""What Landlock does not know of, and a server or a watcher needs the calls for."""
VERSION = landlock.call(444, None, 0, 1) if sys.platform == "linux" else 0
LATER = {"connect": 4, "listen": 4, "end its parent": 6}
"""Attempts, and the version of Landlock that first keeps them off."""

pytestmark = pytest.mark.skipif(VERSION < 1, reason="needs Linux with Landlock")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    for name in ("reads", "writes", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    shutil.copytree(SAMPLE, tmp_path / "bundle")
    return tmp_path


def successes(code: str, room: Path) -> set[str]:
    """Of the attempts, by a process that runs `code`."""
    told = {"bundle": str(room / "bundle"), "reads": [str(room / "reads")], "trusted": None, "max_memory": None}
    named = "bundle, room, port = Path(sys.argv[2]) / 'bundle', Path(sys.argv[2]), int(sys.argv[3])\n"
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as named_socket:
        named_socket.bind(str(room / "socket"))
        named_socket.listen()
        given = [json.dumps({**told, "confined": True}), str(room), str(listening.getsockname()[1])]
        found = subprocess.run(
            [sys.executable, "-c", ATTEMPTS + named + code, *given],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(room / "writes")},
            cwd=room / "other",
        )
    assert found.returncode == 0, found.stderr
    outcomes = json.loads(found.stdout)
    return {name for name, outcome in outcomes.items() if outcome == "done" and LATER.get(name, 0) <= VERSION}


def test_outside_all_of_it_can_be_done(room: Path) -> None:
    """As root; what keeps a process from it below is the confinement."""
    failed = {*LATER, *DONE, *WRITTEN, *LEFT, "read another file", "write into the bundle", "run a program",
              "cut a file", "list the working directory"}  # fmt: skip
    assert successes(FREE, room) >= failed


def test_a_worker_writes_nothing_and_reads_what_it_was_told_of(room: Path) -> None:
    assert successes(WORKER, room) == DONE


def test_a_server_writes_beside_its_index_only(room: Path) -> None:
    found = successes(SERVER, room) - {"note something at a file"}  # not every file system has a place for it
    assert found == DONE | WRITTEN | LEFT | {"listen"}


def test_threads_are_not_left_outside() -> None:
    with pytest.raises(CembedError, match="has started threads"):
        confine([])


@pytest.mark.parametrize("command", [["serve", SAMPLE], ["watch", ".", "--index", "i", "--bundle", SAMPLE]])
def test_a_system_without_landlock_is_an_error(
    command: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from cembed.runtime import landlock; landlock._CREATE_RULESET = 999; from cembed.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), "--confine"], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: --confine was asked for, and this system lacks Landlock")
    assert found.stderr.count("\n") == 1


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def status(process: psutil.Process, field: str) -> str:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def test_a_confined_server_does_all_that_it_should(tmp_path: Path, other: Path, link: Path) -> None:
    """Pages by hand and from a folder, searches, a decoding process and a worker that die, another bundle."""
    temporary, folder, index = (tmp_path / name for name in ("temporary", "folder", "index"))
    temporary.mkdir(), folder.mkdir()
    first, second, third, fourth = sample_pages(4)
    shutil.copy(first, folder / "first.jpg")
    command = Command(
        tmp_path / "log", "serve", link, "--index", index, "--watch", folder, "--port", 0, "--confine", "--reembed",
        "--max-memory", 4000, *QUICK, TMPDIR=str(temporary),
    )  # fmt: skip
    with command.serving() as server:
        wait_for(lambda: server.get("/search?q=invoice").json.get("total") == 1, server.log)
        found = family(psutil.Process(server.process.pid))
        assert len(found) >= 3
        for process in found:
            assert status(process, "NoNewPrivs") == "1"
            assert process.rlimit(psutil.RLIMIT_CORE)[0] == 0
        worker, decoder = found[1:3]
        assert worker.rlimit(psutil.RLIMIT_DATA)[0] == 4000 << 20
        assert decoder.rlimit(psutil.RLIMIT_DATA)[0] == psutil.RLIM_INFINITY
        assert add(server, second) == 200
        for path in (
            "/",
            "/metrics",
            "/openapi.json",
            "/v1/models",
            "/v2",
            "/pages/0/thumbnail",
            "/pages/0/explain?q=a",
        ):
            assert server.get(path).status == 200, path
        decoder.kill()
        wait_for(lambda: add(server, third) == 200, server.log)
        worker.kill()
        wait_for(lambda: add(server, fourth) == 200, server.log)
        assert len(server.get("/search?q=invoice").json["pages"]) == 4
        lead_to(link, Path(shutil.copytree(other, tmp_path / "other")))
        wait_for(lambda: Index.open(index).stats().bundle == Bundle(other).hash, server.log)
    assert "Permission" not in command.log.read_text()
    assert not list(temporary.iterdir())


def add(server: Command, page: Path) -> int:
    return server.post(f"/pages?name={page.name}", page.read_bytes()).status


def test_what_is_always_given_up(tmp_path: Path) -> None:
    """By a server, a watcher, and all that they start; without `--confine`."""
    told = ("--index", tmp_path / "index", "--bundle", SAMPLE, *QUICK)
    (tmp_path / "folder").mkdir()
    shutil.copy(*sample_pages(1), tmp_path / "folder")
    server = Command(tmp_path / "server", "serve", SAMPLE, "--port", 0)
    with server.serving(), Command(tmp_path / "watcher", "watch", tmp_path / "folder", *told) as watcher:
        assert server.post("/embed", sample_pages(1)[0].read_bytes()).status == 200
        wait_for(lambda: len(family(psutil.Process(watcher.process.pid))) == 2, watcher.log)
        for process in [*family(psutil.Process(server.process.pid)), *family(psutil.Process(watcher.process.pid))]:
            assert status(process, "NoNewPrivs") == "1"
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)


def test_a_confined_watcher_moves_files(tmp_path: Path) -> None:
    temporary, folder, index = (tmp_path / name for name in ("temporary", "folder", "index"))
    temporary.mkdir(), folder.mkdir()
    for page in sample_pages(2):
        shutil.copy(page, folder)
    (folder / "bad.pdf").write_bytes(b"nothing")
    moved = ("--move-done", tmp_path / "done", "--move-failed", tmp_path / "failed")
    told = ("--index", index, "--bundle", SAMPLE, "--once", "--confine", "--stable-for", 0, *moved)
    command = Command(tmp_path / "log", "watch", folder, *told, TMPDIR=str(temporary))
    assert command.process.wait(120) == 3, command.log.read_text()
    assert len(Index.open(index)) == 2
    assert len(list((tmp_path / "done").iterdir())) == 2
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["bad.pdf"]


def test_what_needs_more_memory_is_refused_and_the_worker_goes_on(tmp_path: Path) -> None:
    page = io.BytesIO()
    Image.new("RGB", (9000, 9000), "teal").save(page, "JPEG")
    with Server(tmp_path / "log", worker={"max_memory": 300 << 20}) as server:
        (worker, *_) = psutil.Process(server.process.pid).children()
        answer = server.post("/embed", page.getvalue())
        assert answer.status in (422, 500)
        assert "memory" in answer.message
        assert server.post("/embed", sample_pages(1)[0].read_bytes()).status == 200
        assert worker.is_running()


@pytest.mark.parametrize("command", [["serve", SAMPLE], ["watch", ".", "--once", "--index", "i", "--bundle", SAMPLE]])
def test_without_a_cage_for_decoding_nothing_is_decoded(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the page that a bundle brings."""
    (tmp_path / "sitecustomize.py").write_text("from cembed.runtime import landlock\nlandlock._CREATE_RULESET = 999\n")
    monkeypatch.chdir(tmp_path)
    found = Command(tmp_path / "log", *command, "--require-sandbox", PYTHONPATH=str(tmp_path))
    assert found.process.wait(60) == 1
    assert "the sandbox that was required cannot be had" in found.log.read_text()


def test_too_little_memory_is_named(tmp_path: Path) -> None:
    command = Command(tmp_path / "log", "serve", SAMPLE, "--port", 0, "--max-memory", 64)
    assert command.process.wait(60) == 1
    last = command.log.read_text().splitlines()[-1]
    assert last == "error: a worker did not start: --max-memory 64 may be too little for it"
