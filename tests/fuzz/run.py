"""Fuzzes what reads strangers' bytes in Python: anything but a refusal that comes out of it is a bug.

    python tests/fuzz/run.py manifest --seconds 60      # what was found is in build/fuzz/python/
    python tests/fuzz/run.py manifest FILE ...          # those inputs only

With atheris (`pip install atheris`) it is guided by coverage; without, the inputs of corpus/ are changed at random, and
JSON in places where it hurts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mutations  # noqa: E402

TARGETS = {
    "manifest": "files",
    "vectors": "files",
    "state": "files",
    "commit": "files",
    "log": "files",
    "body": "bodies",
    "page": "pages",
}
"""Functions, and the module of each."""
CORPUS, OUT = HERE / "corpus", HERE.parents[1] / "build" / "fuzz" / "python"
MEMORY, SECONDS, LARGEST = 2 << 30, 20, 1 << 16
"""What an input may take: bytes, seconds; and how long it is at most."""
WORDS = (b"\0", b"\xff", b"\x80", b"-1", b"1e999", b"null", b"[]", b"{}", b'"', b"\\ud800", bytes(8), b"\xff" * 8)
Target = Callable[[bytes], bool]


def target(name: str) -> Target:
    function: Target = getattr(importlib.import_module(TARGETS[name]), name)
    return function


def seeds(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def changed(data: bytes, rng: random.Random) -> bytes:
    """Another input, made of one."""
    if rng.random() < 0.3 and (found := changed_json(data, rng)) is not None:
        return found
    content = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place, word = rng.randint(0, len(content)), rng.choice((*WORDS, bytes([rng.randrange(256)])))
        end = place + rng.choice((0, 1, len(word), rng.randint(0, 64)))
        content[place:end] = rng.choice((word, bytes(content[end : end + 64])))
    return bytes(content[:LARGEST])


def changed_json(data: bytes, rng: random.Random) -> bytes | None:
    """With one value of the JSON in it changed; None if there is none."""
    first, last = data.find(b"{"), data.rfind(b"}") + 1
    try:
        value = json.loads(data[first:last])
    except (ValueError, RecursionError):
        return None
    found = list(mutations.places(value))
    if not found:
        return None
    made = mutations.changed(value, rng.choice(found), rng.choice(mutations.KINDS))
    return data[:first] + json.dumps(made).encode() + data[last:]


def inputs(name: str, seed: int) -> Iterator[bytes]:
    """Those of the corpus, and then changed ones without an end."""
    known, rng = seeds(name), random.Random(seed)
    yield from known
    while True:
        data = rng.choice(known)
        for _ in range(rng.randint(1, 3)):
            data = changed(data, rng)
        yield data


def fuzz(name: str, seconds: float, seed: int = 0, most: int | None = None) -> int:
    """How many inputs were tried. An input that does it is written, and the exception goes on."""
    use, end = target(name), time.monotonic() + seconds
    for number, data in enumerate(inputs(name, seed)):
        if time.monotonic() > end or number == most:
            return number
        try:
            use(data)
        except BaseException:
            OUT.mkdir(parents=True, exist_ok=True)
            path = OUT / f"{name}-{seed}-{number}"
            path.write_bytes(data)
            print(f"{path} does it", file=sys.stderr)
            raise
    raise AssertionError("there is no end of inputs")


def guided(name: str, seconds: float) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["cembed"]):
        use = target(name)
    found = OUT / f"{name}_corpus"
    found.mkdir(parents=True, exist_ok=True)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY >> 20}", f"-max_len={LARGEST}"]
    options = [f"-max_total_time={seconds:.0f}", *limits, f"-artifact_prefix={OUT}/{name}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], lambda data: use(data) and None)
    atheris.Fuzz()


def limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for path in given.files:
        target(given.target)(path.read_bytes())
    if given.files:
        return
    if importlib.util.find_spec("atheris"):
        guided(given.target, given.seconds)
    limit()
    print(given.target, fuzz(given.target, given.seconds, given.seed), "inputs, not guided by coverage")


if __name__ == "__main__":
    main()
