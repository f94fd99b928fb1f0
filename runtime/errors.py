"""What is told to the person at the keyboard: the one exception type, and the findings of a verification."""

from __future__ import annotations

from dataclasses import dataclass


class CembedError(Exception):
    """A mistake in what was given: one line saying what, what was given, what is available, what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def missing_extra(what: str, packages: str, extra: str, error: ImportError | None = None) -> CembedError:
    """`what` cannot be done without `packages`, which one of cembed's extras brings; `error` is what an import said.

    >>> missing_extra("pool_factor", "scipy", "pool")
    CembedError("pool_factor needs scipy: install cembed's extra 'pool' (pip install 'cembed[pool]')")
    >>> missing_extra("pool_factor", "scipy", "pool", ImportError("libblas.so: no such file"))
    CembedError('pool_factor needs scipy, which is installed but cannot be loaded: libblas.so: no such file')
    """
    if error is not None and not isinstance(error, ModuleNotFoundError):
        return CembedError(f"{what} needs {packages}, which is installed but cannot be loaded: {one_line(str(error))}")
    return CembedError(f"{what} needs {packages}: install cembed's extra '{extra}' (pip install 'cembed[{extra}]')")


def one_line(text: str) -> str:
    """Text of files or their names that must not make lines of its own, nor steer a terminal.

    >>> one_line("a\\x1b[2J\\n.png")
    'a\\\\x1b[2J\\\\n.png'
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


@dataclass(frozen=True)
class Check:
    """One thing that was verified: `detail` is what there is, or what is damaged."""

    name: str
    passed: bool
    detail: str
