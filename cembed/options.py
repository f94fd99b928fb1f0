"""What commands have in common: types of options, groups of them, and lists. Nothing heavy is imported at the top."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from cembed.export.choices import require_choice
from cembed.runtime.errors import missing_extra
from cembed.streams import held_stderr

if TYPE_CHECKING:
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.embed.embedder import Budget, Decode, Embedder
    from cembed.runtime.pages.documents import PageReader

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
MAX_PIXELS = 100_000_000

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory made by `cembed export`.")]
MadeBy = Annotated[Path, typer.Option("--bundle", metavar="BUNDLE", help="The bundle that makes the vectors.")]
Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help="PDF and image files, or folders of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Trusted = Annotated[
    Path | None,
    typer.Option(
        "--trusted",
        metavar="KEYS",
        help="Take a bundle only if one of these keys has signed it: a public key in PEM, or a folder of them.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads per operator; by default all cores.")]
DecodeOption = Annotated[
    str | None,
    typer.Option(metavar="{single-pass,loop}", help="Latent slots in one pass, or one by one; the former if possible."),
]
SkipBlank = Annotated[
    bool | None, typer.Option(help="Leave blank paper unread, for speed; by default as the bundle says.")
]
SkipBlankPages = Annotated[
    bool, typer.Option("--skip-blank-pages", help="Note pages without any writing, and leave them out of the index.")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try files again that could not be read, though they have not changed.")
]
Result = TypeVar("Result")


def one_of(values: Sequence[str]) -> str:
    """A metavar.

    >>> one_of(["int8", "int4"])
    '{int8,int4}'
    """
    return "{" + ",".join(values) + "}"


def split(values: Sequence[str] | None) -> list[str]:
    """The list of an option that may be repeated, and whose values may have commas.

    >>> split(["1,8", "32"]), split(None)
    (['1', '8', '32'], [])
    """
    return [part.strip() for value in values or () for part in value.split(",")]


def as_decode(value: str | None) -> Decode | None:
    """Raises CembedError: it is no way to decode."""
    require_choice("decode", value or "loop", ("single-pass", "loop"))
    return "single-pass" if value == "single-pass" else "loop" if value else None


def require_packages(extra: str, *names: str) -> None:
    """Raises CembedError that names those of the packages of an extra that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise missing_extra(extra, ", ".join(missing), extra)


@dataclass(frozen=True)
class PageVectors:
    """What a page is made into."""

    num_vectors: Annotated[
        int | None, typer.Option(min=1, help="Vectors of a page; the bundle's full budget by default.")
    ] = None
    max_visual_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Visual tokens a page may take, at most the bundle's limit: fewer are faster."),
    ] = None
    skip_blank: SkipBlank = None
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first components of vectors, normalised again.")] = (
        None
    )
    decode: DecodeOption = None
    pool_factor: Annotated[
        int, typer.Option(min=1, help="Merge the vectors of a bundle with one for every token to a part of them.")
    ] = 1

    def budget(self) -> Budget:
        from cembed.runtime.embed.embedder import Budget

        return Budget(self.num_vectors, self.dim, as_decode(self.decode), self.pool_factor)


@dataclass(frozen=True)
class Reading:
    """How files become pages."""

    dpi: Annotated[float, typer.Option(min=1, max=2400, help="Resolution at which PDF pages are drawn.")] = 144
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that reading one page may take.")] = 60
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1, help="Pixels a page may have. Larger PDF, TIFF and JPEG pages are reduced, others refused."
        ),
    ] = MAX_PIXELS
    require_sandbox: Annotated[
        bool, typer.Option("--require-sandbox", help="Stop where this system cannot confine what decodes files.")
    ] = False

    def reader(self) -> PageReader:
        from cembed.runtime.pages.documents import PageReader

        return PageReader(
            dpi=self.dpi,
            timeout=self.timeout,
            max_pixels=self.max_pixels,
            require_sandbox=self.require_sandbox,
        )


@dataclass(frozen=True)
class Confined:
    """What a process that stays gives up of itself."""

    confine: Annotated[
        bool,
        typer.Option(
            "--confine",
            help="Open nothing but what is named here and the system's libraries, and write only beside the index. "
            "Needs Linux 5.13 with Landlock.",
        ),
    ] = False
    max_memory: Annotated[
        int | None,
        typer.Option(min=64, metavar="MIB", help="Memory that embedding may take, beside weights that are mapped."),
    ] = None

    @property
    def max_bytes(self) -> int | None:
        return None if self.max_memory is None else self.max_memory << 20


def settings_of(page_vectors: PageVectors, reading: Reading, skip_blank: bool = False) -> str:
    """What a page's vectors depend on beside its file's bytes; `skip_blank` is what was chosen, or the bundle's.

    Pages of indexes that are there are known by it: what came later is left out where it is as before.
    """
    made = page_vectors
    settings = [made.num_vectors, made.dim, made.pool_factor, made.max_visual_tokens, reading.dpi]
    later = [reading.max_pixels] if reading.max_pixels != MAX_PIXELS else []
    return json.dumps([*settings, *later, *(["skip_blank"] if skip_blank else [])])


@dataclass(frozen=True)
class Engine:
    """What computes."""

    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            help="Engines in order of preference: 'onnxruntime-bf16', 'onnxruntime-exact' (int8 without VNNI), "
            "'tensorrt' (see build-engine), 'openvino', 'openvino-bf16', or ONNX Runtime's execution providers; for "
            "one graph as in 'vision=openvino'. By default what tune chose, else ONNX Runtime on the CPU.",
        ),
    ] = None
    threads: Threads = None
    trusted: Trusted = None

    def open(self, bundle: Path) -> Bundle:
        """Raises CembedError: no bundle, a damaged one, one whose signature will not do."""
        from cembed.runtime.bundle.bundle import Bundle

        return Bundle(bundle, trusted=self.trusted)

    def skips_blank(self, bundle: Path, chosen: bool | None) -> bool:
        """Whether blank paper is left unread, by what was chosen, or what the bundle says."""
        return self.open(bundle).manifest.image.skip_blank if chosen is None else chosen

    def load(
        self,
        bundle: Path,
        max_visual_tokens: int | None = None,
        prepack: bool | None = True,
        skip_blank: bool | None = None,
    ) -> Embedder:
        """Raises CembedError as `open`, and: an engine that is not there, what the bundle cannot do."""
        from cembed.runtime.embed.embedder import Embedder

        with held_stderr():
            return Embedder.load(
                bundle,
                providers=split(self.provider) or None,
                threads=self.threads,
                prepack=prepack,
                max_visual_tokens=max_visual_tokens,
                skip_blank=skip_blank,
                trusted=self.trusted,
            )


def loading_fields(bundle: Path, page_vectors: PageVectors, reading: Reading, engine: Engine) -> dict[str, Any]:
    """Fields of a `Loading`, but for `threads` and `prepack`."""
    return {
        "bundle": str(bundle.absolute()),
        "providers": tuple(split(engine.provider)),
        "max_visual_tokens": page_vectors.max_visual_tokens,
        "skip_blank": page_vectors.skip_blank,
        "trusted": None if engine.trusted is None else str(engine.trusted.absolute()),
        "dpi": reading.dpi,
        "timeout": reading.timeout,
        "max_pixels": reading.max_pixels,
        "require_sandbox": reading.require_sandbox,
    }


def spread(command: Callable[..., Result]) -> Callable[..., Result]:
    """`command` as typer shall see it: in the place of each parameter that is a dataclass, that dataclass's fields."""
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: found.annotation for name, found in parameters.items() if is_dataclass(found.annotation)
    }

    @wraps(command)
    def spread_out(**values: Any) -> Result:  # typer gives each option by its name
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    shown = [one for name, found in parameters.items() for one in _spread_parameter(found, groups.get(name))]
    spread_out.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return spread_out


def _spread_parameter(parameter: inspect.Parameter, group: Any) -> list[inspect.Parameter]:
    named = inspect.Parameter.KEYWORD_ONLY  # so that one without default may come after those that have one
    if group is None:
        return [parameter.replace(kind=named)]
    kinds: Mapping[str, Any] = get_type_hints(group, include_extras=True)
    defaults = {
        field.name: inspect.Parameter.empty if field.default is MISSING else field.default for field in fields(group)
    }
    return [inspect.Parameter(name, named, default=defaults[name], annotation=kinds[name]) for name in defaults]
