"""The cage of the decoding process: what it gives up once it runs, since the files it reads may take it over.

Landlock takes the file system, TCP and signals to others away, and a seccomp filter every system call that decoding
does not need. Both are Linux's; where one is missing the other is used, and what is missing is said.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from cembed.runtime import landlock, seccomp
from cembed.runtime.seccomp import ALLOW, AND, ARGUMENTS, DENY, EQUAL, KILL, LOAD, RETURN, Calls, step

FONTS = (
    "/usr/share/fonts",
    "/usr/share/X11/fonts/Type1",
    "/usr/share/X11/fonts/TTF",
    "/usr/local/share/fonts",
)
"""Where PDFium looks for what a PDF leaves to the machine: it opens them when a page needs one."""

_EVERY_BIT, _EXEC, _EMPTY_PATH = 0xFFFF_FFFF, 4, 0x1000
_FCNTL = (0, 1, 2, 3, 1030)  # duplicates, and flags of descriptors: no signals, locks or leases

# The first are the most frequent.
_CALLS: Calls = {
    "read": (0, 63),
    "write": (1, 64),
    "futex": (202, 98),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "recvmsg": (47, 212),
    "close": (3, 57),
    "fstat": (5, 80),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "memfd_create": (319, 279),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# No decoder ever has a use for these: whatever asks for one has been taken over, and its process ends.
_DEADLY: Calls = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "keyctl": (250, 219),
}


@dataclass(frozen=True)
class _Guarded:
    """A call that is allowed where an argument, of which `mask` says what matters, is one of `values`."""

    numbers: tuple[int, int]
    argument: int
    mask: int
    values: tuple[int, ...]


def lock_files() -> str | None:
    """Takes the file system from this thread and from those that it starts later, but for reading fonts.

    Returns what stands in the way of it, as a person may be told, or None.
    """
    return landlock.restrict((folder, landlock.READ) for folder in FONTS)


def filter_calls(fonts: bool) -> str | None:
    """Leaves all threads only the system calls that decoding needs; files can be opened for reading if `fonts`.

    Returns what stands in the way of it, as a person may be told, or None.
    """
    return seccomp.install(partial(_filter, fonts=fonts))


def _guarded(fonts: bool) -> Iterator[_Guarded]:
    yield _Guarded((9, 222), 2, _EXEC, (0,))  # mmap: no new code
    yield _Guarded((10, 226), 2, _EXEC, (0,))  # mprotect
    yield _Guarded((72, 25), 1, _EVERY_BIT, _FCNTL)
    yield _Guarded((262, 79), 3, _EVERY_BIT, (_EMPTY_PATH,))  # newfstatat as glibc's fstat uses it
    yield _Guarded((234, 131), 0, _EVERY_BIT, (os.getpid(),))  # tgkill as abort() uses it
    yield _Guarded((62, 129), 0, _EVERY_BIT, (os.getpid(),))  # kill
    if fonts:
        yield _Guarded((257, 56), 2, _EVERY_BIT & ~os.O_CLOEXEC, (os.O_RDONLY,))  # openat


def _filter(column: int, architecture: int, fonts: bool) -> Iterator[bytes]:
    yield from seccomp.beginning(architecture)
    yield from seccomp.verdicts(_CALLS, column, ALLOW)
    yield from seccomp.verdicts(_DEADLY, column, KILL)
    for call in _guarded(fonts):
        yield step(EQUAL, call.numbers[column], 0, 3 + 2 * len(call.values))
        yield step(LOAD, ARGUMENTS + 8 * call.argument)  # the lower half: these arguments are ints
        yield step(AND, call.mask)
        for value in call.values:
            yield step(EQUAL, value, 0, 1)
            yield step(RETURN, ALLOW)
        yield step(RETURN, DENY)
    yield step(RETURN, DENY)
