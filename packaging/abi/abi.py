"""The binary interface of libcembed as text: what a program that was compiled against it relies on.

python packaging/abi/abi.py build/lib/libcembed.so > packaging/abi/libcembed.txt

libcembed.txt is that of the last release; a test compares. Lines may be added. When one is changed or is gone, programs
that were compiled before break: CEMBED_ABI_VERSION in cembed.h goes up, with it the names of library and package, and
libcembed.txt is written anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "runtime" / "native" / "include" / "cembed.h"
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
STRUCT = re.compile(r"typedef struct (\w+) \{(.*?)\} \w+;", re.DOTALL)
ENUM = re.compile(r"typedef enum (\w+) \{(.*?)\} \w+;", re.DOTALL)
FUNCTION = re.compile(r"^CEMBED_API (.*?\));", re.DOTALL | re.MULTILINE)
ABI = re.compile(r"#define CEMBED_ABI_VERSION (\d+)")


@dataclass(frozen=True)
class Header:
    text: str

    @property
    def abi(self) -> str:
        (number,) = ABI.findall(self.text)
        return str(number)

    @property
    def functions(self) -> list[str]:
        return sorted(" ".join(text.split()) for text in FUNCTION.findall(self.text))

    @property
    def structs(self) -> dict[str, list[str]]:
        return {name: fields(body) for name, body in STRUCT.findall(self.text)}

    @property
    def constants(self) -> list[str]:
        return [name for _, body in ENUM.findall(self.text) for name in re.findall(r"(\w+) =", body)]


def fields(body: str) -> list[str]:
    """Names of what is declared in a struct.

    >>> fields(" int32_t width, height; const char *id; ")
    ['width', 'height', 'id']
    """
    return [re.findall(r"\w+", name)[-1] for line in body.split(";") if line.strip() for name in line.split(",")]


def program(header: Header) -> str:
    """A C program that prints numbers, sizes and places."""
    prints = [f'printf("constant {name} = %d\\n", (int){name});' for name in header.constants]
    for name, names in header.structs.items():
        prints.append(f'printf("struct {name}: %zu bytes\\n", sizeof({name}));')
        prints.extend(place_of(name, field) for field in names)
    head = "#include <stddef.h>\n#include <stdio.h>\n#include <cembed.h>\nint main(void) {\n"
    return head + "\n".join([*prints, "return 0; }"])


def place_of(struct: str, field: str) -> str:
    values = f"offsetof({struct}, {field}), sizeof((({struct} *)0)->{field})"
    return f'printf("struct {struct}: {field} at %zu, %zu bytes\\n", {values});'


def layout(header: Header) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "layout.c", Path(folder) / "layout"
        source.write_text(program(header))
        subprocess.run(["cc", f"-I{HEADER.parent}", source, "-o", binary], check=True)
        return subprocess.run([binary], check=True, capture_output=True, text=True).stdout.splitlines()


def listed(library: Path) -> list[str]:
    """Its name and its symbols, with their versions if they have any."""
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    names = sorted(line.split()[-1] for line in symbols.splitlines())
    return [f"soname {name}" for name in re.findall(r"SONAME.*\[(.*)\]", dynamic)] + [
        f"symbol {name}" for name in names
    ]


def describe(library: Path) -> list[str]:
    header = Header(COMMENT.sub("", HEADER.read_text()))
    functions = [f"function {text}" for text in header.functions]
    return [f"abi {header.abi}", *listed(library), *functions, *layout(header)]


if __name__ == "__main__":
    print("\n".join(describe(Path(sys.argv[1]))))
