"""What `cembed serve` and `cembed watch` give up: always what they never need, with `--confine` all files but those
that they were told of, and the network that they do not use.

Nothing heavy is imported here, as it has to be done while there is one thread.
"""

from __future__ import annotations

import contextlib
import glob
import mimetypes
import os
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cembed.runtime.errors import CembedError
from cembed.runtime.landlock import (
    BIND,
    CONNECT,
    DEVICE,
    LIST,
    READ,
    RUN,
    SIGNALS,
    UNIX,
    WRITE,
    give_up_privileges,
    restrict,
)
from cembed.runtime.seccomp import Calls, refuse

SYSTEM = (
    "/usr", "/lib", "/lib64", "/proc", "/sys", "/opt/nvidia", "/opt/intel", "/etc/cembed", "/etc/ssl", "/etc/pki",
    "/etc/fonts", "/etc/OpenCL", "/etc/ld.so.cache", "/etc/localtime", "/etc/resolv.conf", "/etc/hosts",
    "/etc/services", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/nv_tegra_release",
)  # fmt: skip
"""What libraries are, and what they ask of the machine; Python's own folders come to it."""
DEVICES = ("null", "zero", "random", "urandom", "nvidia*", "nvhost*", "nvmap", "dri")
LOADERS = ("/lib*/ld-*.so*", "/lib/*/ld-*.so*", "/usr/lib*/ld-*.so*", "/usr/lib/*/ld-*.so*")
"""What the system runs programs by: workers and decoding processes are Python's."""
EVERY_TCP = BIND | CONNECT
NEVER_EMBEDDING: Calls = {
    "socket": (41, 198),  # pairs of them are made by another call
    "io_uring_setup": (425, 425),
    "ptrace": (101, 117),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "truncate": (76, 45),
}
"""What a worker has no use for, and Landlock leaves: sockets of every kind, what is known of files it cannot open."""
OURS = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def give_up_little(max_memory: int | None = None) -> None:
    """No rights of programs that have more, and no core dumps, which have people's pages in them. Memory of its own is
    `max_memory` bytes at most; weights that are mapped from files do not count."""
    if sys.platform == "linux":
        give_up_privileges()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if max_memory is not None:
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
            resource.setrlimit(resource.RLIMIT_DATA, (max_memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def confine(reads: Iterable[str], writes: Iterable[str] = (), tcp: int = EVERY_TCP) -> None:
    """Leaves files and folders that are read, folders that are written to, and of TCP what `tcp` does not name.

    Raises CembedError: this system cannot, or there are threads already, which would be left as they are.
    """
    if sys.platform == "linux" and len(os.listdir("/proc/self/task")) > 1:
        raise CembedError("--confine comes too late: this process has started threads")
    # Who listens for clients may have to tell systemd so at an abstract socket.
    scopes = SIGNALS | UNIX if tcp & BIND else SIGNALS
    _require(restrict(_rules(reads, writes), tcp=tcp, scopes=scopes))


def confine_embedding(reads: Iterable[str]) -> None:
    """The same, for a process that writes nothing and speaks with the one that started it only."""
    confine(reads)
    _require(refuse(NEVER_EMBEDDING))


def _require(lacking: str | None) -> None:
    if lacking is not None:
        raise CembedError(f"--confine was asked for, and this system lacks {lacking}")


def _rules(reads: Iterable[str], writes: Iterable[str]) -> Iterator[tuple[str, int]]:
    here = {"", os.getcwd()}  # of `python -m`: not what was named
    python = (OURS, sys.prefix, sys.base_prefix, *(path for path in sys.path if path not in here))
    libraries = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    policy = map(os.path.dirname, filter(None, (os.environ.get("CEMBED_TRUST"),)))
    yield from (
        (path, READ | LIST) for path in (*SYSTEM, *map(str, mimetypes.knownfiles), *python, *libraries, *policy, *reads)
    )
    yield from ((path, WRITE) for path in writes)
    yield from ((path, READ | RUN) for path in (sys.executable, *_found(LOADERS)))
    yield from ((path, DEVICE | LIST) for path in _found(f"/dev/{name}" for name in DEVICES))


def _found(patterns: Iterable[str]) -> Iterator[str]:
    return (path for pattern in patterns for path in glob.glob(pattern))


def readable(bundle: str | Path, *others: str | Path | None) -> list[str]:
    """A bundle and what stands beside it under its name, and others if they are given; where the bundle is a link, the
    folders that have the link and what it leads to, as it will lead to another one."""
    given, real = os.path.abspath(bundle), os.path.realpath(bundle)
    folders = [os.path.dirname(given), os.path.dirname(real)] if given != real else []
    return [real, *glob.glob(f"{glob.escape(real)}.*"), *folders, *(str(other) for other in others if other)]


def written(index: Path | None, others: Sequence[Path] = ()) -> list[str]:
    """The folder that an index is in, with all that is beside it, that of temporary files, and others."""
    beside = [] if index is None else [str(index.absolute().parent)]
    return [*beside, tempfile.gettempdir(), *map(str, others)]
