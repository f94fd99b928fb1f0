"""Crash tests of deployed bundles: functions that count what they tried. `python tests/crash/deploys.py kills 300`.

A state is the pair of bundles that are the current and the previous version. While an operation runs, it is the pair
before or the pair after; what is current is whole, byte for byte, and so is what `rollback` goes back to.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from disks import ERRORS, FaultyDisk, TreeDisk
from runs import folder, in_child

from cembed.runtime.bundle import manifest_file
from cembed.runtime.bundle.bundle import Bundle, record_files
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.disk import Disk
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.updates import deploy as deploying
from cembed.runtime.updates.content import verify_bundle
from cembed.runtime.updates.deploy import deploy, rollback
from cembed.runtime.updates.diff import diff
from cembed.runtime.updates.versions import CURRENT, DIGITS, LOCK, VERSIONS, Shelf, current_hash, resolve

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "bundle"
BACK = "back"
OPERATIONS = ("a", "b", "c", "a", "b by patch", BACK, "b", BACK, BACK)
"""Bundles that are deployed one after the other, and steps back."""
State = tuple[str | None, str | None]


def small(place: Path, name: str) -> Path:
    """A bundle of some kilobytes that has no weights to speak of; `name` is in two of its files."""
    root = place / name
    root.mkdir()
    manifest = Bundle(SAMPLE).manifest
    sides = {side: replace(manifest.side(side), latent_token_id=0) for side in ("document", "query")}
    table = replace(manifest.token_embeddings, rows=2)
    for file in manifest.files:
        own = name if file in ("text.data", "text.onnx") else ""
        (root / file).write_bytes(random.Random(file + own).randbytes(900))
    (root / table.file).write_bytes(bytes(2 * manifest.hidden_size))
    if table.scales:
        (root / table.scales).write_bytes(bytes(8))
    return signed(root, replace(manifest, image_token_id=0, token_embeddings=table, **sides))


def look_at_no_graphs(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Those of small() are none: what is tested are files."""
    patch(Bundle, "_inspect", lambda self, name: None)


def variant(place: Path, name: str) -> Path:
    """The sample bundle with a few weights that are a little different."""
    root = Path(shutil.copytree(SAMPLE, place / name))
    weights = bytearray((root / "text.data").read_bytes())
    weights[-1 - ord(name) :: 7] = bytes(weight ^ 1 for weight in weights[-1 - ord(name) :: 7])
    (root / "text.data").write_bytes(weights)
    return signed(root, Bundle(SAMPLE).manifest)


def signed(root: Path, manifest: Manifest) -> Path:
    write_manifest(root, replace(manifest, files=record_files(root)).to_json())
    return root


def make_all(place: Path) -> dict[str, Path]:
    """Where the bundles of OPERATIONS are."""
    made = {name: small(place, name) for name in "abc"}
    diff(made["a"], made["b"], place / "b.cembed-patch")
    return {**made, "b by patch": place / "b.cembed-patch"}


def untried() -> None:
    """Bundles without weights cannot pass a self-test. The same few manifests are read thousands of times."""
    deploying.try_bundle = lambda bundle, trial: 1.0
    manifest_file.parse_manifest = functools.cache(manifest_file.parse_manifest)


def after(state: State, operation: str) -> State:
    current, previous = state
    wanted = previous if operation == BACK else operation[0]
    return state if wanted == current else (wanted, current)


def states() -> list[State]:
    """Before each operation, and at the end."""
    found: list[State] = [(None, None)]
    for operation in OPERATIONS:
        found.append(after(found[-1], operation))
    return found


def apply(to: Path, operation: str, made: dict[str, Path], disk: Disk) -> None:
    if operation == BACK:
        rollback(to, disk=disk)
    else:
        deploy(made[operation], to, disk=disk)


def state_of(to: Path, names: dict[str, str]) -> State:
    """What is deployed, every byte of it compared; `names` are bundles by their hash."""
    shelf = Shelf(to)
    there = (shelf.current, shelf.previous)
    current, previous = (None if name is None else names[verify_bundle(shelf.path(name)).hash] for name in there)
    assert current_hash(to / CURRENT) == (None if shelf.current is None else Bundle(to / CURRENT).hash)
    return current, previous


def names_of(made: dict[str, Path]) -> dict[str, str]:
    return {Bundle(path).hash: name for name, path in made.items() if path.is_dir()}


def go_on(to: Path, state: State, made: dict[str, Path], names: dict[str, str]) -> None:
    """The next deploy succeeds, and nothing is left over."""
    for operation in ("c", "a", BACK):
        apply(to, operation, made, Disk())
        state = after(state, operation)
        assert state_of(to, names) == state
    there = {Bundle(made[name]).hash[:DIGITS] for name in state if name}
    beside = {f"{name}.before" for name in there}
    assert {path.name for path in to.iterdir()} <= {CURRENT, VERSIONS, LOCK}
    assert {path.name for path in (to / VERSIONS).iterdir()} <= there | beside


def power_cuts(seed: int, samples: int, step: int = 1) -> Counter[str]:
    """The power may fail after every `step`-th change to the disk, in `samples` ways each."""
    untried()
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        made, to = make_all(root), root / "device"
        names, disk, allowed = names_of(made), TreeDisk(to), list[State]()

        def cut() -> None:
            for _ in range(samples if disk.count % step == 0 else 0):
                with folder() as place:
                    disk.cut_power(rng, place)
                    left = state_of(place, names)
                    assert left in allowed, (left, allowed)
                    counts["cuts"] += 1
                    if rng.random() < 0.1:
                        go_on(place, left, made, names)
                        counts["gone on"] += 1

        disk.watch = cut  # type: ignore[method-assign]
        for state, operation in zip(states(), OPERATIONS, strict=False):
            allowed[:] = [state, after(state, operation)]
            apply(to, operation, made, disk)
            allowed[:] = [after(state, operation)]
            cut()
    return counts


class Killed(BaseException):
    """Ends a deploy as SIGKILL would: what was written, and not waited for, is still there."""


def kills_then_cuts(seed: int, step: int = 1) -> Counter[str]:
    """A process is killed at every `step`-th change, the next one does it again, then the power fails: what it told is
    so, also where it found the work of the first one done."""
    untried()
    deploying._give_up = lambda shelf, name: None
    counts = Counter[str]()
    with folder() as root:
        made = make_all(root)
        for at in range(1, count_changes(made) + 1, step):
            with folder() as place:
                counts[kill_then_cut(place / "device", made, at, random.Random(seed + at))] += 1
    return counts


def kill_then_cut(to: Path, made: dict[str, Path], at: int, rng: random.Random) -> str:
    names, disk, done = names_of(made), TreeDisk(to), 0

    def kill() -> None:
        if disk.count == at:
            raise Killed

    disk.watch = kill  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        for operation in OPERATIONS:
            apply(to, operation, made, disk)
            done += 1
    if done == len(OPERATIONS):
        return "not killed"
    seen, again = state_of(to, names), OPERATIONS[done] if OPERATIONS[done] != BACK else "c"
    assert seen in (states()[done], after(states()[done], OPERATIONS[done]))
    apply(to, again, made, disk)
    for _ in range(4):
        with folder() as place:
            disk.cut_power(rng, place)
            assert state_of(place, names) == after(seen, again), (seen, again)
    return f"during {OPERATIONS[done]}"


def count_changes(made: dict[str, Path]) -> int:
    with folder() as root:
        disk = FaultyDisk(0)
        for operation in OPERATIONS:
            apply(root / "device", operation, made, disk)
        return disk.count


def errors(step: int = 1) -> Counter[str]:
    """Every `step`-th change to the disk fails, with each error: it is told, or did not matter; the next one works."""
    untried()
    counts = Counter[str]()
    with folder() as root:
        made = make_all(root)
        for at in range(1, count_changes(made) + 1, step):
            for error in ERRORS:
                with folder() as place:
                    counts[fail_once(place / "device", made, FaultyDisk(at, error))] += 1
    return counts


def fail_once(to: Path, made: dict[str, Path], disk: FaultyDisk) -> str:
    names, outcome = names_of(made), "not noticed"
    for state, operation in zip(states(), OPERATIONS, strict=False):
        try:
            apply(to, operation, made, disk)
        except CembedError:
            outcome = "reported"
            left = state_of(to, names)
            assert left in (state, after(state, operation)), (left, state, operation)
            if left == state:
                apply(to, operation, made, Disk())
        assert state_of(to, names) == after(state, operation)
    return outcome


def kills_everywhere(step: int = 1) -> Counter[str]:
    """A process is killed at every `step`-th change that it makes to the disk."""
    untried()
    counts = Counter[str]()
    with folder() as root:
        made = make_all(root)
        for at in range(1, count_changes(made) + 1, step):
            with folder() as place:
                to = place / "device"
                begun = in_child(lambda tell, to=to, at=at: run(to, made, FaultyDisk(at), tell), None)
                counts[after_kill(to, begun, made)] += 1
    return counts


def run(to: Path, made: dict[str, Path], disk: Disk, tell: int) -> None:
    for operation in OPERATIONS:
        os.write(tell, b".")
        apply(to, operation, made, disk)


def after_kill(to: Path, begun: int, made: dict[str, Path]) -> str:
    names = names_of(made)
    state, operation = states()[begun - 1], OPERATIONS[begun - 1]
    left = state_of(to, names) if to.exists() else (None, None)
    assert left in (state, after(state, operation)), (left, state, operation)
    go_on(to, left, made, names)
    return f"during {operation}"


def kills(rounds: int, seed: int = 0) -> Counter[str]:
    """Processes that deploy three models in turns, self-test and all, are killed at random moments. After each third
    one another ends well, which also tells how long it takes."""
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        made = {name: variant(root, name) for name in "abc"}
        names, to = names_of(made), root / "device"
        state: State = (None, None)
        whole = 0.0
        for round_ in range(rounds):
            if round_ % 3 == 0:
                started, wanted = time.perf_counter(), following(state)
                assert in_child(lambda tell, path=made[wanted]: tell_deployed(path, to, tell), None) == 1
                whole, state = time.perf_counter() - started, after(state, wanted)
                assert state_of(to, names) == state
                assert in_child(lambda tell: tell_loaded(to, tell), None) == 1
                counts["ended well"] += 1
            wanted, seconds = following(state), rng.uniform(0, 1.3 * whole)
            told = in_child(lambda tell, path=made[wanted]: tell_deployed(path, to, tell), seconds)
            left = state_of(to, names)
            assert left in [after(state, wanted), *([] if told else [state])], (left, state, told)
            counts["killed after the switch" if left != state else "killed before"] += 1
            state = left
    return counts


def following(state: State) -> str:
    """What is deployed next: it is neither the current version nor the one before."""
    return {"a": "b", "b": "c", "c": "a"}.get(str(state[0]), "a")


def tell_loaded(to: Path, tell: int) -> None:
    vectors = Embedder.load(resolve(to / CURRENT)).embed_query("a page")
    os.write(tell, b"." if len(vectors) else b"")


def tell_deployed(bundle: Path, to: Path, tell: int) -> None:
    deploy(bundle, to)
    os.write(tell, b".")


if __name__ == "__main__":
    look_at_no_graphs()
    name, *arguments = sys.argv[1:]
    begin = time.perf_counter()
    found = globals()[name](*map(int, arguments))
    print(name, arguments, dict(found), f"{sum(found.values())} in {time.perf_counter() - begin:.1f} s")
