"""Crash tests of the index: functions that count what they tried. `python tests/crash/runs.py kills 200` runs one.

Each checks after every crash that the index opens and holds a state it may hold, byte for byte, that it can be written
again, and that a second crash does no harm either.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from disks import ERRORS, FaultyDisk, RecordingDisk
from scenario import Operation, State, after, allowed, apply, make_small, operations, read, start, state_of

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index import index as index_module
from cembed.runtime.index.files import CURRENT
from cembed.runtime.index.index import Index
from cembed.runtime.index.verify import verify_index

COUNT = 12  # operations of a run


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    memory = Path("/dev/shm")  # waiting for a disk shows nothing here
    place = Path(tempfile.mkdtemp(prefix="cembed-crash-", dir=memory if memory.is_dir() else None))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def check(path: Path, states: list[State]) -> State:
    """The state of an index after a crash, which must be one of `states`, for a reader and for the next writer."""
    seen = read(path)
    assert seen in states, (seen, states)
    assert read(path, write=True) == seen
    assert all(check.passed for check in verify_index(path)), list(verify_index(path))
    return seen


def go_on(path: Path, state: State) -> None:
    """An index that came through a crash takes pages and removals as any other."""
    with Index.open(path, write=True) as index:
        for operation in operations(99, state, 3):
            if operation.kind != "reopen":
                apply(index, operation, Disk())
                state = after(state, operation)
        assert state_of(index) == state
    assert read(path) == state


def power_cuts(seed: int, samples: int, step: int = 1) -> Counter[str]:
    """A run in which the power may fail after every `step`-th change to the disk, in `samples` ways each."""
    make_small()
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        disk, state, running = RecordingDisk(root / "index"), State(), [Operation("reopen")]
        created = False

        def cut() -> None:
            for _ in range(samples if disk.count % step == 0 else 0):
                with folder() as place:
                    disk.cut_power(rng, place)
                    if not created and not (place / CURRENT).exists():
                        counts["not made yet"] += 1
                        continue
                    counts["cuts"] += 1
                    left = check(place, allowed(state, running[0]))
                    if rng.random() < 0.05:
                        go_on(place, left)

        disk.watch = cut
        index = start(root / "index", disk)
        created = True
        for operation in operations(seed, state, COUNT):
            running[0] = operation
            index = apply(index, operation, disk)
            state = after(state, operation)
        index.close()
        assert read(root / "index") == state
    return counts


class Killed(BaseException):
    """Ends a run as SIGKILL would: what was written, and not waited for, is still there."""


def kills_then_cuts(seed: int, step: int = 1) -> Counter[str]:
    """A writer is killed at every `step`-th change, the next one starts and adds pages, then the power fails."""
    return sum((kill_then_cut(seed, at) for at in range(1, count_changes(seed) + 1, step)), Counter[str]())


def kill_then_cut(seed: int, at: int) -> Counter[str]:
    rng, counts = random.Random(at), Counter[str]()
    with folder() as root:
        path = root / "index"
        disk, possible = killed_at(path, seed, at)
        if not (path / CURRENT).exists():
            return Counter({"during creation": 1})

        def cut() -> None:
            with folder() as place:
                disk.cut_power(rng, place)
                check(place, possible)
                counts["cuts"] += 1

        disk.watch = cut
        with Index.open(path, write=True, disk=disk) as index:
            seen, more = state_of(index), Operation("add", (("page 1", 1000), ("another", 1000)))
            possible[:] = allowed(seen, more)  # what a writer shows when it starts must stay
            cut()
            apply(index, more, disk)
            possible[:] = [after(seen, more)]
            cut()
    return counts


def killed_at(path: Path, seed: int, at: int) -> tuple[RecordingDisk, list[State]]:
    """The disk as change number `at` leaves it, and the states that may be on it."""
    make_small()
    disk, state, running = RecordingDisk(path), State(), Operation("reopen")

    def kill() -> None:
        if disk.count == at:
            raise Killed

    disk.watch = kill
    index: Index | None = None
    try:
        index = start(path, disk)
        for running in operations(seed, state, COUNT):
            index = apply(index, running, disk)
            state = after(state, running)
        index.close()
    except Killed:
        if index is not None and index._lock_handle is not None:
            os.close(index._lock_handle)
    return disk, allowed(state, running)


def count_changes(seed: int) -> int:
    with folder() as root:
        disk = FaultyDisk(0)
        run(root / "index", disk, seed)
        return disk.count


def run(path: Path, disk: Disk, seed: int, tell: int | None = None) -> State:
    """A whole run; each operation that is done is told, as a byte, to the handle `tell`."""
    make_small()
    index, state = start(path, disk), State()
    for operation in operations(seed, state, COUNT):
        if tell is not None:
            os.write(tell, b".")
        index = apply(index, operation, disk)
        state = after(state, operation)
    index.close()
    return state


def errors(seed: int, step: int = 1) -> Counter[str]:
    """Every `step`-th change to the disk fails, with each error; the caller opens the index again and goes on."""
    make_small()
    counts = Counter[str]()
    for at in range(1, count_changes(seed) + 1, step):
        for error in ERRORS:
            counts[fail_once(seed, FaultyDisk(at, error))] += 1
    return counts


def fail_once(seed: int, disk: FaultyDisk) -> str:
    state = State()
    with folder() as root:
        path = root / "index"
        try:
            index = start(path, disk)
        except CembedError:
            with contextlib.suppress(CembedError):
                start(path, Disk()).close()
            check(path, [state])
            return "at creation"
        outcome = "not noticed"
        for operation in operations(seed, state, COUNT):
            following = attempt(index, operation, disk)
            if following is None:
                outcome = "reported"
                ended(index)
                state = check(path, allowed(state, operation))
                index = Index.open(path, write=True)
                state = resume(index, state, operation)
            else:
                index, state = following, after(state, operation)
        try:
            index.close()
        except CembedError:
            outcome = "reported"
        check(path, [state])
    return outcome


def attempt(index: Index, operation: Operation, disk: Disk) -> Index | None:
    """The index to go on with, None after an error."""
    try:
        return apply(index, operation, disk)
    except CembedError:
        return None


def ended(index: Index) -> None:
    """The end of a program that gives up: whatever close says, the lock is free."""
    with contextlib.suppress(CembedError):
        index.close()


def resume(index: Index, state: State, operation: Operation) -> State:
    """Does the rest of an operation that was cut short."""
    if operation.kind == "remove":
        operation = Operation("remove", tuple(page for page in operation.pages if page[0] in state))
    if operation.kind != "reopen":
        apply(index, operation, Disk())
    return after(state, operation)


def kill_at(seed: int, at: int) -> str:
    """A process is killed at change number `at`."""
    with folder() as root:
        done = in_child(lambda tell: run(root / "index", FaultyDisk(at), seed, tell), None)
        return after_kill(root / "index", seed, done)


def after_kill(path: Path, seed: int, done: int) -> str:
    state, steps = State(), list(operations(seed, State(), COUNT))
    for operation in steps[: max(0, done - 1)]:
        state = after(state, operation)
    if done == 0:
        with contextlib.suppress(CembedError):
            start(path, Disk()).close()
    left = check(path, allowed(state, steps[done - 1] if done else None))
    go_on(path, left)
    return "during creation" if done == 0 else f"during {steps[done - 1].kind}"


def in_child(work: object, seconds: float | None) -> int:
    """How many operations a child had begun when it ended, or was killed after `seconds`."""
    reading, tell = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(reading)
            work(tell)  # type: ignore[operator]
        os._exit(0)
    os.close(tell)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return len(pipe.read())


def kills(rounds: int, seed: int = 0) -> Counter[str]:
    """`rounds` processes are killed, each at a random moment of its run."""
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        started = time.perf_counter()
        run(root / "index", Disk(), seed)
        whole = time.perf_counter() - started
    for round_ in range(rounds):
        with folder() as root:
            path = root / "index"
            done = in_child(lambda tell, p=path, s=round_: run(p, Disk(), s, tell), rng.uniform(0, whole))
            if (path / CURRENT).exists() or done:
                counts[after_kill(path, round_, done)] += 1
            else:
                counts["before creation"] += 1
    return counts


def kills_everywhere(seed: int, step: int = 1) -> Counter[str]:
    """A process is killed at every `step`-th change it makes to the disk."""
    return Counter(kill_at(seed, at) for at in range(1, count_changes(seed) + 1, step))


def flips(step: int = 1, mask: int = 0xFF) -> Counter[str]:
    """Every `step`-th byte of a small index is changed, one at a time: all that is given is right, or damage named."""
    make_small()
    counts = Counter[str]()
    with folder() as root:
        original = root / "index"
        state = run(original, Disk(), 5)
        whole = read(original)
        assert whole == state
        for file in sorted(original.iterdir()):
            content = file.read_bytes()
            for place in range(0, len(content), step):
                changed = bytearray(content)
                changed[place] ^= mask
                file.write_bytes(changed)
                counts[flipped(original, whole, file.name)] += 1
            file.write_bytes(content)
    return counts


def flipped(path: Path, whole: State, name: str) -> str:
    damaged = [check.detail for check in verify_index(path) if not check.passed]
    seen = error = None
    try:
        seen = read(path)
    except CembedError as raised:
        error = str(raised)
    if error is not None:
        assert str(path) in error
        assert damaged, error
        assert all(name in text or name == CURRENT for text in damaged), (name, damaged)
        return f"named ({name.partition('.')[2] or name})"
    assert seen == whole
    return "harmless" if not damaged else f"in what was removed ({name.partition('.')[2]})"


def mend(seed: int, rounds: int) -> Counter[str]:
    """Bytes anywhere are damaged, and `compact(drop_damaged=True)` leaves an index without wrong pages."""
    make_small()
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        state = run(root / "index", Disk(), 5)
        versions = {(page, version) for op in operations(5, State(), COUNT) for page, version in op.pages}
        for _ in range(rounds):
            copy = Path(shutil.copytree(root / "index", root / "copy"))
            file = rng.choice([path for path in sorted(copy.iterdir()) if path.suffix])
            content = bytearray(file.read_bytes())
            for _ in range(min(len(content), rng.randint(1, 20))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content[: rng.randint(0, len(content))] if rng.random() < 0.3 else content)
            with Index.open(copy, write=True, damaged=True) as index:
                dropped = index.compact(drop_damaged=True).dropped
            seen = check(copy, [read(copy)])
            assert set(seen.items()) <= versions
            counts["nothing was lost" if seen == state else "pages were lost"] += 1
            counts["pages named"] += len(dropped)
            shutil.rmtree(copy)
    return counts


PR_SET_PTRACER = 0x59616D61
SYSCALLS = {
    "pwrite64": "pwrite64",
    "fsync": "fsync",
    "fdatasync": "fdatasync",
    "ftruncate": "ftruncate",
    "rename": "rename,renameat,renameat2",
    "unlink": "unlink,unlinkat",
}


def injections(seed: int) -> Counter[str]:
    """A process under strace is killed, or told EIO or ENOSPC, at every call that changes the disk."""
    counts, whole = Counter[str](), State()
    for operation in operations(seed, whole, COUNT):
        whole = after(whole, operation)
    for name, number in count_calls(seed).items():
        for when in range(1, number + 1):
            for what in ("signal=SIGKILL", "error=EIO", "error=ENOSPC"):
                with folder() as root:
                    inject = ["-e", f"trace={SYSCALLS[name]}", "-e", f"inject={SYSCALLS[name]}:{what}:when={when}"]
                    done = traced(root / "index", seed, root / "log", inject)
                    if done is None:
                        check(root / "index", [whole])
                    else:
                        after_kill(root / "index", seed, done)
                    counts[f"{name} {what}: {'not noticed' if done is None else 'ended it'}"] += 1
    return counts


def count_calls(seed: int) -> dict[str, int]:
    with folder() as root:
        log = root / "log"
        assert traced(root / "index", seed, log, ["-e", f"trace={','.join(SYSCALLS.values())}"]) is None
        text = log.read_text()
        return {
            name: len(re.findall(rf"^\d+ +(?:{calls.replace(',', '|')})\(", text, re.MULTILINE))
            for name, calls in SYSCALLS.items()
        }


def traced(path: Path, seed: int, log: Path, options: list[str]) -> int | None:
    """How many operations had begun when a run under strace ended, None where it ended well."""
    (reading, tell), (gate, opens) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # so that strace need not be root
            os.read(gate, 1)
            index_module.ThreadPoolExecutor = Inline  # type: ignore[misc, assignment]
            run(path, Disk(), seed, tell)
            os._exit(0)
        os._exit(1)
    command = ["strace", "-f", "-p", str(child), "-o", str(log), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        os.write(opens, b".")
        _, status = os.waitpid(child, 0)
    for handle in (tell, gate, opens):
        os.close(handle)
    with os.fdopen(reading, "rb") as pipe:
        done = len(pipe.read())
    return done if status else None


class Inline(Executor):
    """Does all in one thread: strace counts the calls of each."""

    def __init__(self, workers: int) -> None: ...

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        future = Future[Any]()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    begin = time.perf_counter()
    found = globals()[name](*map(int, arguments))
    print(name, arguments, dict(found), f"{sum(found.values())} in {time.perf_counter() - begin:.1f} s")
