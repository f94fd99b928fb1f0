"""What a decoding process tries that a file has taken over: run in the place of `worker._open`, for tests/test_cage.py.

Each attempt gets the file that was handed over, and the reading side's id; what it returns is how it succeeded.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import RefusedError

SUCCESS = "succeeded: "
SECRET, PORT, NAME = "", 0, b""  # a file of the user, a port and a UNIX socket that are listened on, as the test says
LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine
NUMBERS = {
    # name: x86-64, aarch64
    "clone": (56, 220),
    "clone3": (435, 435),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "ioctl": (16, 29),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "unshare": (272, 97),
    "memfd_create": (319, 279),
    "execveat": (322, 281),
    "prlimit64": (302, 261),
    "fchmod": (91, 52),
    "sendmsg": (46, 211),
    "setuid": (105, 146),
    "chroot": (161, 51),
    "mount": (165, 40),
    "perf_event_open": (298, 241),
    "shmget": (29, 194),
    "inotify_init1": (294, 26),
}


def call(name: str | int, *arguments: int | bytes) -> int:
    """A system call, by itself. Raises OSError."""
    number = name if isinstance(name, int) else NUMBERS[name][MACHINE == "aarch64"]
    LIBC.syscall.restype = ctypes.c_long
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    if (result := int(LIBC.syscall(ctypes.c_long(number), *wide))) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def opened(path: str) -> str:
    with open(path, "rb") as file:
        return repr(file.read(20))


def connected(family: int, address: Any) -> str:
    with socket.socket(family) as made:
        made.connect(address)
    return "connected"


def listening(family: int, address: Any) -> str:
    with socket.socket(family) as made:
        made.bind(address)
        made.listen()
    return "listens"


def forked() -> str:
    if (child := os.fork()) == 0:
        os._exit(0)
    return f"process {child}"


def other_descriptors() -> str:
    """Any descriptor but the request's socket, /dev/null, the pipe of replies, and the file handed over."""
    kinds = [os.fstat(number) for number in range(64) if is_open(number)]
    others = [about for about in kinds if about.st_rdev != os.fstat(2).st_rdev]
    if len(others) > 3:
        return f"{len(others)} beside /dev/null"
    raise PermissionError(errno.EPERM, "only what it needs")


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def mapped_code(descriptor: int) -> str:
    mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    return f"{len(mapping)} bytes of code"


def made_code() -> str:
    mapping = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if LIBC.mprotect(ctypes.c_void_p(address), 4096, 5) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "memory is code"


def program_in_memory() -> str:
    made = os.memfd_create("program")
    os.write(made, b"#!/bin/sh\n")
    return str(call("execveat", made, b"", 0, 0, 0x1000))


def parent_memory(parent: int) -> str:
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_void_p * 2)(0x400000, 8)
    return str(call("process_vm_readv", parent, bytes(local), 1, bytes(remote), 1, 0))


def written_back() -> str:
    return str(os.write(0, b"to the socket that requests come from"))


Attempt = Callable[[int, int], object]
ATTEMPTS: dict[str, Attempt] = {
    # name: what it does with the descriptor handed over, and the reading side's id
    "open /etc/shadow": lambda *_: opened("/etc/shadow"),
    "open a file of the user": lambda *_: opened(SECRET),
    "open a file named from a folder of fonts": lambda *_: opened("/usr/share/fonts/../../../etc/passwd"),
    "open what was handed over by its path": lambda file, _: opened(f"/proc/self/fd/{file}"),
    "open its own memory": lambda *_: opened("/proc/self/mem"),
    "open the parent's memory": lambda _, parent: opened(f"/proc/{parent}/mem"),
    "open a descriptor of the parent": lambda _, parent: opened(f"/proc/{parent}/fd/0"),
    "read the parent's environment": lambda _, parent: opened(f"/proc/{parent}/environ"),
    "look at a path": lambda *_: os.stat(SECRET),
    "list a folder": lambda *_: os.listdir("/"),
    "have more descriptors than it needs": lambda *_: other_descriptors(),
    "write a file": lambda *_: Path(SECRET).with_name("made").write_bytes(b"a"),
    "write to a file that is there": lambda *_: os.open(SECRET, os.O_WRONLY),
    "write to what was handed over": lambda file, _: os.write(file, b"a"),
    "change the mode of what was handed over": lambda file, _: call("fchmod", file, 0o777),
    "control what was handed over": lambda file, _: call("ioctl", file, 0x80086601, b"\0" * 8),
    "make a folder": lambda *_: os.mkdir("/tmp/planted"),
    "remove a file": lambda *_: os.unlink(SECRET),
    "change its root": lambda *_: call("chroot", b"/"),
    "connect over TCP": lambda *_: connected(socket.AF_INET, ("127.0.0.1", PORT)),
    "listen on TCP": lambda *_: listening(socket.AF_INET, ("127.0.0.1", 0)),
    "listen on a UNIX socket": lambda *_: listening(socket.AF_UNIX, f"\0planted-{os.getpid()}"),
    "connect to a UNIX socket": lambda *_: connected(socket.AF_UNIX, NAME),
    "send by UDP": lambda *_: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "watch packets": lambda *_: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "write to the socket of requests": lambda *_: written_back(),
    "run a program": lambda *_: os.execv("/bin/true", ["true"]),
    "run a program in memory": lambda *_: program_in_memory(),
    "fork": lambda *_: forked(),
    "clone": lambda *_: call("clone", 17, 0, 0, 0, 0),
    "vfork": lambda *_: call("clone", 0x4000 | 0x100 | 17, 0, 0, 0, 0),
    "clone3": lambda *_: call("clone3", b"\0" * 32 + b"\x11" + b"\0" * 55, 88),
    "trace the parent": lambda _, parent: call("ptrace", 16, parent, 0, 0),
    "read the parent's memory": lambda _, parent: parent_memory(parent),
    "take a descriptor of the parent": lambda *_: call("pidfd_getfd", 0, 0, 0),
    "hold the parent": lambda _, parent: call("pidfd_open", parent, 0),
    "end the parent": lambda _, parent: os.kill(parent, 9),
    "signal every process": lambda *_: os.kill(-1, 0),
    "move the parent's limits": lambda _, parent: call("prlimit64", parent, 7, b"\x40" + b"\0" * 15, 0),
    "lift its own limits": lambda *_: call("prlimit64", 0, 9, b"\xff" * 16, 0),
    "map a file as code": lambda file, _: mapped_code(file),
    "turn memory into code": lambda *_: made_code(),
    "undo: privileges": lambda *_: call("prctl", 38, 0, 0, 0, 0),
    "undo: the filter": lambda *_: call("seccomp", 0, 0, 0),
    "undo: a space of names": lambda *_: call("unshare", 0x10000000),
    "be another user": lambda *_: call("setuid", 65534),
    "mount": lambda *_: call("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
    "use io_uring": lambda *_: call("io_uring_setup", 1, b"\0" * 120),
    "load into the kernel": lambda *_: call("bpf", 0, b"\0" * 64, 64),
    "watch events": lambda *_: call("perf_event_open", b"\0" * 64, 0, -1, -1, 0),
    "watch files": lambda *_: call("inotify_init1", 0),
    "share memory by a key": lambda *_: call("shmget", 0, 4096, 0o1600),
    "pass a descriptor on": lambda *_: call("sendmsg", 0, b"\0" * 56, 0),
    "call as x32 does": lambda *_: call(0x40000000 + 39),
}


def attempt(file: File, *_: object) -> None:
    """In the place of `worker._open`: the name of the attempt is what the file holds."""
    name = file.read().decode()
    try:
        result = ATTEMPTS[name](file.descriptor, os.getppid())
    except OSError as error:
        raise RefusedError(f"refused: {errno.errorcode[error.errno or 0]}") from None
    raise RefusedError(f"{SUCCESS}{result}")
