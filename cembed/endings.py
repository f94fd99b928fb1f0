"""How a command ends: its exit status, and the line that says why."""

from __future__ import annotations

import errno
import os
import warnings
from itertools import pairwise
from typing import Any

from cembed.display import complain
from cembed.options import EXIT_FAILED, EXIT_USAGE
from cembed.runtime.errors import CembedError
from cembed.signals import Stopped

EXIT_INTERRUPTED = 130
FLOATS = ("--dpi", "--timeout", "--min-cosine", "--max-ndcg-drop")
SHOW_WARNING = warnings.showwarning


def refuse_nan(arguments: list[str]) -> None:
    """NaN by its name: to the limits of an option it would only be above one or below the other."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith(FLOATS) else [word])]
    for option, value in pairwise(words):
        if option in FLOATS and value.lower().lstrip("+-") == "nan":
            complain(f"error: {option} is {value}: give a number")
            raise SystemExit(EXIT_USAGE)


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours on one line, without where they come from; others as ever."""
    if category is RuntimeWarning:
        complain(f"warning: {message}")
    else:
        SHOW_WARNING(message, category, *where, **more)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and line for what ended a command."""
    if isinstance(error, Stopped):
        return error.status, error.message
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, CembedError):
        return EXIT_FAILED, f"error: {error}"
    if isinstance(error, MemoryError):
        return EXIT_FAILED, "error: there is not enough memory (--debug shows where)"
    if isinstance(error, (OSError, ImportError)):
        return EXIT_FAILED, f"error: {reason(error)} (--debug shows where)"
    return EXIT_FAILED, f"error: {type(error).__name__}: {error} (--debug shows where; please report it)"


def reason(error: OSError | ImportError) -> str:
    """What the system says, of which file, and what to do where that is known."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return f"{error.strerror}{place}{': raise `ulimit -n`' if error.errno == errno.EMFILE else ''}"
