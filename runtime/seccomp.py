"""Filters of system calls (seccomp) of Linux, on x86-64 and aarch64: what a process will not do, it gives up."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable, Iterable, Iterator

from cembed.runtime.landlock import call, give_up_privileges

DENY, KILL, ALLOW = 0x0005_0001, 0x8000_0000, 0x7FFF_0000  # of seccomp.h; the first is EPERM
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # of bpf_common.h
ARGUMENTS = 16  # where seccomp_data has them
_NUMBER, _ARCHITECTURE = 0, 4
_SET_FILTER, _ALL_THREADS = 1, 1
_X32 = 0x4000_0000
MACHINES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""By what Python calls a machine: the place of its numbers in a `Calls`, and AUDIT_ARCH of audit.h."""
Calls = dict[str, tuple[int | None, int | None]]
"""Numbers on x86-64 and on aarch64, None where there is no such call."""


def install(steps_of: Callable[[int, int], Iterable[bytes]]) -> str | None:
    """Puts a filter on all threads: `steps_of` the place and the architecture of this machine in MACHINES.

    Returns what stands in the way of it, as a person may be told, or None.
    """
    machine = MACHINES.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
    if machine is None:
        return "a filter of system calls (seccomp, here for Linux on x86-64 and aarch64)"
    code = b"".join(steps_of(*machine))
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))  # struct sock_fprog
    if give_up_privileges() < 0 or call((317, 277)[machine[0]], _SET_FILTER, _ALL_THREADS, program) != 0:
        return f"a filter of system calls (seccomp: {os.strerror(ctypes.get_errno())})"
    return None


def refuse(calls: Calls) -> str | None:
    """Takes these calls from all threads. Returns what stands in the way of it, or None."""

    def steps(place: int, architecture: int) -> Iterator[bytes]:
        yield from beginning(architecture)
        yield from verdicts(calls, place, DENY)
        yield step(RETURN, ALLOW)

    return install(steps)


def beginning(architecture: int) -> Iterator[bytes]:
    """Ends a process that calls as another machine; then the number of the call is what steps compare."""
    yield step(LOAD, _ARCHITECTURE)
    yield step(EQUAL, architecture, 1, 0)
    yield step(RETURN, KILL)
    yield step(LOAD, _NUMBER)
    yield step(AT_LEAST, _X32, 0, 1)
    yield step(RETURN, KILL)


def verdicts(calls: Calls, place: int, verdict: int) -> Iterator[bytes]:
    for number in (numbers[place] for numbers in calls.values()):
        if number is not None:
            yield step(EQUAL, number, 0, 1)
            yield step(RETURN, verdict)


def step(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    """An instruction of classic BPF. Jumps count instructions that are passed over."""
    return struct.pack("=HBBI", code, if_so, if_not, value)
