"""The C library against the Python runtime, in one run: cold start, a page, queries of 16 callers, memory.

    python bench/library.py --bundle sample --library build/lib --rounds 7

Both sides are processes with the same bundle, page and ONNX Runtime; they take turns, and are started anew each round.
`--library` is the folder that cmake built libcembed in.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import pages
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from cembed.runtime.engines.quiet import ort as onnxruntime

CALLERS, QUERIES, PAGES = 16, 400, 5
WANTED = {"page": 1.02, "queries/s": 1.3, "memory": 0.8, "cold start": 0.5}
INCLUDE = Path(__file__).resolve().parents[1] / "runtime" / "native" / "include"
Row = dict[str, float]

PYTHON_SIDE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from cembed.runtime import Embedder
embedder = Embedder.load(sys.argv[1])
embedder.embed_query("warranty period")
print("ready", flush=True)
from PIL import Image
image = Image.open(sys.argv[2], formats=("PPM",))
image.load()
for line in sys.stdin:
    word, *numbers = line.split()
    start = time.perf_counter()
    if word == "page":
        embedder.embed_image(image)
    elif word == "queries":
        with ThreadPoolExecutor(int(numbers[0])) as pool:
            texts = [f"warranty period of the appliance {i}" for i in range(int(numbers[1]))]
            list(pool.map(embedder.embed_query, texts))
    answer = time.perf_counter() - start
    if word == "memory":
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
        answer = int(status.split()[0]) / 1024
    print(answer, flush=True)
"""


class Side:
    """A process that answers commands; `cold` are the seconds from its start to the first query's vectors."""

    def __init__(self, command: list[str]) -> None:
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{command[0]} ended with {self.process.wait()}")
        self.cold = time.perf_counter() - start

    def ask(self, command: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def measure(command: list[str]) -> Row:
    side = Side(command)
    row = {"cold start": side.cold}
    time.sleep(pages.PAUSE)
    row["page"] = median(side.ask("page") for _ in range(PAGES + 1))
    side.ask(f"queries {CALLERS} {CALLERS}")
    row["queries/s"] = QUERIES / side.ask(f"queries {CALLERS} {QUERIES}")
    row["memory"] = side.ask("memory")
    side.close()
    return row


def build(library: Path, folder: Path) -> Path:
    source, program = Path(__file__).with_suffix(".cpp"), folder / "library"
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{INCLUDE}", f"-L{library}", f"-Wl,-rpath,{library.resolve()}"]
    subprocess.run(["c++", *flags, str(source), "-lcembed", "-o", str(program)], check=True)
    return program


def report(rows: list[tuple[Row, Row]]) -> dict[str, Row]:
    table = Table("", "C library", "Python", "ratio", "needed", "")
    summary = {}
    for name, needed in WANTED.items():
        ours, theirs = (median(row[i][name] for row in rows) for i in (0, 1))
        ratio = median(row[0][name] / row[1][name] for row in rows)
        met = ratio >= needed if name == "queries/s" else ratio <= needed
        table.add_row(name, f"{ours:.4g}", f"{theirs:.4g}", f"{ratio:.3f}", f"{needed}", "met" if met else "MISSED")
        summary[name] = {"library": ours, "python": theirs, "ratio": ratio}
    Console(width=100, highlight=False).print(table)
    return summary


def main(
    bundle: Annotated[Path, typer.Option(help="Made by `cembed export`.")],
    library: Annotated[Path, typer.Option(help="Where cmake built libcembed.")] = Path("build/lib"),
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    """Time the C library and the Python runtime in turn."""
    engine = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    os.environ["CEMBED_ONNXRUNTIME"] = str(engine)
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "page.ppm"
        Image.Image.save(pages.draw_page(), page)
        program = build(library, Path(temporary))
        commands = [[str(program)], [sys.executable, "-c", PYTHON_SIDE]]
        rows: list[tuple[Row, Row]] = []
        for number in range(rounds):
            turn = [measure([*command, str(bundle), str(page)]) for command in commands[:: 1 - 2 * (number % 2)]]
            rows.append((turn[0], turn[1]) if number % 2 == 0 else (turn[1], turn[0]))
    summary = report(rows)
    if json_path is not None:
        result = {"hardware": pages.hardware(len(os.sched_getaffinity(0))), "summary": summary, "rounds": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
