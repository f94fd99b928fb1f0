"""JSON files that others made, read field by field: what is odd in them is named, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from cembed.runtime.errors import CembedError

MAX_BYTES = 1 << 26
"""Of a file of settings; tokenizers are larger."""
MAX_COUNT = 1 << 24
"""Of anything that a configuration counts: products of three stay within what 64 bits hold."""


def read_json(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a file of at most `most` bytes. Raises CembedError: missing, larger, no JSON, no object."""
    require_file(path)
    try:
        if path.stat().st_size > most:
            raise CembedError(f"{path} has {path.stat().st_size} bytes: at most {most} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CembedError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CembedError(f"{path} holds no JSON object")
    return value


def require_file(path: Path) -> None:
    """Raises CembedError for what is not there, and for folders, pipes and devices."""
    if not path.is_file():
        raise CembedError(f"{path} is {'no file' if path.exists() else 'missing'}")


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters.

    >>> one_line(ValueError("for field 'x':\\n    expected int"))
    "for field 'x': expected int"
    """
    return " ".join(str(error).split())[:300] or type(error).__name__


@dataclass(frozen=True)
class Settings:
    """An object of a JSON file; `where` is the file, and the object's place in it.

    Each method reads one field and raises CembedError, which names it, if it is absent, null or of another kind.
    """

    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Settings:
        return cls(str(path), read_json(path))

    def over(self, defaults: Mapping[str, Any]) -> Settings:
        """The same, with `defaults` for fields that are not there; null stays."""
        return Settings(self.where, {**defaults, **self.values})

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def section(self, name: str) -> Settings:
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Settings(f"{self.where}: {name}", value)

    def count(self, name: str, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number from `least` to `most`; 3.0 is one."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, f"a whole number from {least} to {most}")
        return value

    def counts(self, name: str, least: int = 1) -> tuple[int, ...]:
        value = self.values.get(name)
        if not isinstance(value, list):
            self.refuse(name, "a list of whole numbers")
        items = Settings(f"{self.where}: {name}", {str(i): item for i, item in enumerate(value)})
        return tuple(items.count(place, least) for place in items.values)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if not is_number(value):
            self.refuse(name, "a number")
        return float(value)

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            self.refuse(name, "a number above 0")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            self.refuse(name, "a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return default if value is None else value

    def require(self, name: str, *supported: object) -> None:
        """For a setting that would change the numbers, and is implemented for these values only."""
        value = self.values.get(name)
        if not any(type(value) is type(known) and value == known for known in supported):
            self.refuse(name, " or ".join(map(repr, supported)))

    def refuse(self, name: str, supported: str) -> NoReturn:
        given = f"is {self.values[name]!r:.80}" if name in self.values else "is missing"
        raise CembedError(f"{self.where}: {name} {given}: supported is {supported}")


def is_number(value: object) -> TypeGuard[float]:
    """
    >>> [is_number(value) for value in (1, 2.5, True, "3", None, float("nan"), 10**400)]
    [True, True, False, False, False, False, False]
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
