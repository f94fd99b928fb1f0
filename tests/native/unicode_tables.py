"""Writes unicode_tables.h: what the installed `tokenizers` library takes for letters, numbers and compositions.

    python tests/native/unicode_tables.py > runtime/native/lib/unicode_tables.h

Its regular expressions and its normaliser know different versions of Unicode, and neither is that of Python, PCRE2 or
utf8proc: so the library itself is asked about every code point. Combining classes and pairs never change once they are
given, and come from `unicodedata`, as far as the library knows them too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, groupby

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CODE_POINTS = tuple(chain(range(0xD800), range(0xE000, 0x110000)))
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic
NFC, NFD = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str


def matched(pattern: str) -> Iterator[int]:
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    for piece, _ in split.pre_tokenize_str("".join(map(chr, CODE_POINTS))):
        yield from map(ord, piece)


def ranges(code_points: Iterable[int]) -> Iterator[str]:
    for _, run in groupby(enumerate(code_points), lambda pair: pair[1] - pair[0]):
        members = [code_point for _, code_point in run]
        yield f"{{{members[0]:#x}, {members[-1]:#x}}}"


def combining_class(code_point: int) -> int:
    """0 unless the library moves the mark before one of class 240, or one of class 1 before the mark."""
    mark = chr(code_point)
    moves = any(NFD(text) != text for text in (f"a\u0345{mark}", f"a{mark}\u0334"))
    return unicodedata.combining(mark) if moves and NFD(mark) == mark else 0


def combining_ranges() -> Iterator[str]:
    marks = [(code_point, combining_class(code_point)) for code_point in CODE_POINTS if code_point >= 0x300]
    for value, run in groupby(marks, lambda pair: pair[1]):
        for members in (list(run),) if value else ():
            yield f"{{{members[0][0]:#x}, {members[-1][0]:#x}, {value}}}"


def decompositions() -> Iterator[str]:
    """Code point, the one or two that it is made of, and whether these become it again."""
    for code_point in CODE_POINTS:
        if code_point in HANGUL or NFD(chr(code_point)) == chr(code_point):
            continue
        parts = "".join(chr(int(part, 16)) for part in unicodedata.decomposition(chr(code_point)).split())
        assert NFD(parts) == NFD(chr(code_point)), f"{code_point = :#x}"
        assert NFD(parts[1:]) == parts[1:], f"{code_point = :#x}"  # the reader takes only first parts apart
        first, second = [*map(ord, parts), 0][:2]
        again = len(parts) == 2 and NFC(parts) == chr(code_point)
        yield f"{{{code_point:#x}, {first:#x}, {second:#x}, {str(again).lower()}}}"


def table(kind: str, name: str, rows: Iterable[str]) -> str:
    lines = [""]
    for row in rows:
        if len(lines[-1]) + len(row) > 112:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else '    '}{row}"
    return f"constexpr {kind} {name}[] = {{\n" + ",\n".join(lines) + "};\n"


def main() -> None:
    print(f"// Written by tests/native/unicode_tables.py with tokenizers {tokenizers.__version__}: do not edit.")
    print("#pragma once\n")
    print('#include "unicode.h"\n\nnamespace cembed::unicode {\n')
    print(table("Range", "LETTERS", ranges(matched(r"\p{L}+"))))
    print(table("Range", "NUMBERS", ranges(matched(r"\p{N}+"))))
    print(table("Range", "SPACES", ranges(matched(r"\s+"))))
    print(table("Combining", "COMBINING", combining_ranges()))
    print(table("Decomposition", "DECOMPOSITIONS", decompositions()))
    print("}  // namespace cembed::unicode")


if __name__ == "__main__":
    main()
