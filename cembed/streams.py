"""Standard output and error as they may be: full, closed, without Unicode, or written to by native libraries."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import IO

from cembed.runtime.errors import CembedError


def printable(text: str) -> str:
    r"""`text` on one line, with what a terminal would act on written as escapes: names of files may hold anything.

    >>> print(printable("Grüße 写真.pdf\n\x1b[31m"))
    Grüße 写真.pdf\n\x1b[31m
    """
    return "".join(c if is_shown(c) else repr(c)[1:-1] for c in text)


def is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def allow_any_text() -> None:
    """What the streams' encoding does not have is written as escapes, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def output_named() -> Iterator[None]:
    """Raises CembedError where standard output cannot be written."""
    try:
        yield
    except BrokenPipeError as error:
        drop_output()
        raise CembedError("standard output was closed before all was written") from error
    except OSError as error:
        drop_output()
        raise CembedError(f"cannot write to standard output: {error.strerror or error}") from error


def flush_output() -> None:
    with output_named():
        if sys.stdout is not None:
            sys.stdout.flush()


def drop_output() -> None:
    """What standard output still holds goes nowhere: Python would try again when it ends, and say so."""
    with contextlib.suppress(OSError, ValueError):  # tests put a StringIO there
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextlib.contextmanager
def held_stderr() -> Iterator[None]:
    """What native code writes to standard error is shown after the block, but for the panics of the tokenizers library.

    They are raised as well, and named then.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            real = os.dup(2)
        except OSError:  # there is no standard error, or no room
            held = None
        if held is not None:
            os.dup2(held.fileno(), 2)
            stack.callback(release_stderr, held, real)
        yield


def release_stderr(held: IO[bytes], real: int) -> None:
    """Puts standard error back to `real`; what was `held` goes there."""
    os.dup2(real, 2)
    os.close(real)
    held.seek(0)
    said = held.read()
    if b" panicked at " not in said:
        with contextlib.suppress(OSError), open(2, "wb", closefd=False) as stderr:
            stderr.write(said)
