"""Diagrams, by matplotlib, which the extra `eval` installs and nothing else here needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cembed.runtime.errors import CembedError, missing_extra


@contextlib.contextmanager
def picture(out: Path, panels: int, size: tuple[float, float]) -> Iterator[list[Any]]:
    """Axes side by side, of `size` inches together, that are saved as `out` when the block ends.

    Raises CembedError: no matplotlib, a file that cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("a picture", "matplotlib", "eval", error) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=True, constrained_layout=True, squeeze=False)
    try:
        yield list(axes[0])
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise CembedError(f"cannot write {out}: {error.strerror or error}") from error
    except ValueError as error:
        raise CembedError(f"cannot write {out}: {error}") from error
    finally:
        pyplot.close(figure)
