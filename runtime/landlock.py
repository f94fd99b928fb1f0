"""Landlock of Linux: takes the file system, TCP and what reaches other processes from this thread and from all that it
starts later, programs too, but for what is named. It can be made stricter afterwards, and never undone."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable

READ, LIST, RUN = 1 << 2, 1 << 3, 1 << 0  # of landlock.h: to read files, to list folders, to run programs
WRITE = LIST | READ | 1 << 1 | sum(1 << bit for bit in (4, 5, 7, 8, 12, 13, 14))
"""To make, change, move and remove files, folders and links. No sockets, pipes or devices."""
DEVICE = READ | 1 << 1 | 1 << 15
"""To read, write and control a device that is there."""
BIND, CONNECT = 1, 2
"""Of TCP; from Linux 6.7 on."""
UNIX, SIGNALS = 1, 2
"""What reaches processes that are not under the same rules: abstract sockets, signals; from Linux 6.12 on."""

_NO_NEW_PRIVS = 38  # of prctl.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
# All rights of the file system by the version that first knew them; TCP's came with version 4, scopes with version 6.
_FILE_RIGHTS = {5: (1 << 16) - 1, 3: (1 << 15) - 1, 2: (1 << 14) - 1, 1: (1 << 13) - 1}
_OF_FILES = RUN | DEVICE | 1 << 14
"""Rights that a path which is no folder can have."""


def restrict(
    rules: Iterable[tuple[str, int]], *, tcp: int = BIND | CONNECT, scopes: int = UNIX | SIGNALS
) -> str | None:
    """Leaves the rights in `rules` at their paths and below them, and none at others; takes what `tcp` and `scopes`
    say. Paths that do not exist are passed over.

    Returns what stands in the way of it, as a person may be told, or None.
    """
    version = call(_CREATE_RULESET, None, 0, _VERSION) if sys.platform == "linux" else -1
    if version < 1:
        return "Landlock (Linux 5.13 has it, unless it was left out or switched off)"
    rights = next(rights for since, rights in _FILE_RIGHTS.items() if version >= since)
    words = [rights, *([tcp] if version >= 4 else []), *([scopes] if version >= 6 else [])]
    ruleset_attr = struct.pack(f"={len(words)}Q", *words)
    ruleset = call(_CREATE_RULESET, ruleset_attr, len(ruleset_attr), 0)
    if ruleset < 0:
        return f"Landlock ({os.strerror(ctypes.get_errno())})"
    try:
        added = all(_add(ruleset, path, allowed & rights) for path, allowed in rules)
        if not added or give_up_privileges() < 0 or call(_RESTRICT_SELF, ruleset, 0) < 0:
            return f"Landlock ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(ruleset)
    return None


def _add(ruleset: int, path: str, rights: int) -> bool:
    try:
        there = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        rights &= -1 if stat.S_ISDIR(os.fstat(there).st_mode) else _OF_FILES
        return not rights or call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, there), 0) == 0
    finally:
        os.close(there)


def give_up_privileges() -> int:
    """From now on no program that is run gets more rights than this process has."""
    return int(ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))


def call(number: int, *arguments: int | bytes | None) -> int:
    """A system call that Python has no function for; -1 and errno where it fails."""
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(system_call(ctypes.c_long(number), *wide))
