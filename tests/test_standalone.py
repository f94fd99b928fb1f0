"""The runtime stands alone: without torch and what belongs to it, as it is on a device and in a wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from cembed import runtime
from cembed.runtime import Bundle, Embedder, VectorFile
from cembed.runtime.engines.quiet import ort as onnxruntime
from cembed.runtime.scoring import gpu

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "peft", "huggingface_hub")
FOLDERS = {
    "cembed": "cembed",
    "cembed/export": "export",
    "cembed/quantize": "quantize",
    "cembed/runtime": "runtime",
    "cembed/scale": "scale",
    "cembed/serve": "serve",
}
"""Folders of the wheel, and where the tree has them."""
ROOMS = ("bundle", "embed", "engines", "index", "intake", "pages", "pages/pdf", "pages/tiff", "scoring", "updates")
SOURCES = (
    FOLDERS
    | {"cembed/scale/connectors": "scale/connectors"}
    | {f"cembed/runtime/{room}": f"runtime/{room}" for room in ROOMS}
)
MAIN = "from cembed.cli import main; main()"
MAIN_THEN_MODULES = f"""
import sys
from cembed.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print()
print(sorted(set(sys.modules) & set({HEAVY})))
"""


def python(
    code: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with which every Python process, the page reader's worker too, lacks the heavy packages."""
    folder = tmp_path_factory.mktemp("blocked")
    lines = ["import sys", f"for name in {HEAVY}:", "    sys.modules[name] = None"]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    assert python("import torch", PYTHONPATH=str(folder)).returncode == 1
    return str(folder)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    page = Image.new("RGB", (120, 160), "white")
    page.save(folder / "two.pdf", save_all=True, append_images=[page])
    shutil.copy(GOLDEN / "causalqwen2_5" / "small.png", folder)
    return folder


def test_every_name_of_the_runtime_is_there(blocked: str) -> None:
    code = """
import cembed.runtime
for name in cembed.runtime.__all__:
    assert getattr(cembed.runtime, name).__name__ == name
import cembed.runtime.pages.documents, cembed.runtime.verify, cembed.cli, cembed.display, cembed.export.choices
"""
    done = python(code, PYTHONPATH=blocked)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="nothing"):
        runtime.nothing  # noqa: B018


def test_embed_search_and_verify(blocked: str, causal_bundle: Path, documents: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "v.npz"
    done = python(MAIN, "embed", causal_bundle, documents, "--out", vectors, PYTHONPATH=blocked)
    assert done.returncode == 0, done.stderr
    assert len(VectorFile.load(vectors)) == 3
    done = python(MAIN, "search", vectors, "total", "--bundle", causal_bundle, "--json", PYTHONPATH=blocked)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3
    done = python(MAIN, "verify", causal_bundle, PYTHONPATH=blocked)
    assert done.returncode == 0, done.stderr
    assert "self-test" in done.stdout


def test_export_says_what_to_install(blocked: str, tmp_path: Path) -> None:
    options = ["--backbone", "qwen2.5-vl", "--model", GOLDEN / "causalqwen2_5", "--out", tmp_path / "bundle"]
    done = python(MAIN, "export", *options, PYTHONPATH=blocked)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: export needs torch")
    assert "extra 'export'" in line
    assert not list(tmp_path.iterdir())


def test_embed_and_search_load_nothing_heavy(causal_bundle: Path, documents: Path, tmp_path: Path) -> None:
    """Here the packages are installed, and still not imported."""
    vectors = tmp_path / "v.npz"
    for command in (
        ["embed", causal_bundle, documents, "--out", vectors],
        ["search", vectors, "total", "--bundle", causal_bundle],
    ):
        done = python(MAIN_THEN_MODULES, *command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import cembed", ("numpy", "typer", "onnxruntime", *HEAVY)),
        ("import cembed.runtime", ("onnxruntime", "tokenizers", *HEAVY)),
        (
            "import cembed.runtime.pages.documents",
            ("onnxruntime", "tokenizers", "safetensors", "typer", "rich", *HEAVY),
        ),
        ("from cembed.runtime import maxsim", ("onnxruntime", "PIL", *HEAVY)),
        ("from cembed.runtime.scoring import timing", ("onnxruntime", "PIL", "typer", *HEAVY)),
        ("import cembed.cli", ("onnxruntime", "tokenizers", "PIL", "numpy", "rich.table", *HEAVY)),
        ("from cembed.runtime import Embedder", ("typer", "rich", *HEAVY)),
    ],
)
def test_imports_bring_little(statement: str, absent: tuple[str, ...]) -> None:
    done = python(f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & set({absent})))")
    assert done.stdout.strip() == "[]", done.stderr


def test_queries_never_load_the_vision_graph(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    session = onnxruntime.InferenceSession

    def record(path: str, *arguments: Any, **options: Any) -> Any:
        loaded.append(Path(path).name)
        return session(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    embedder = Embedder.load(causal_bundle)
    assert loaded == []
    embedder.embed_queries(["one", "two"])
    assert loaded == ["text.onnx"]
    embedder.embed_image(Image.new("RGB", (64, 64)))
    assert loaded == ["text.onnx", "vision.onnx"]


# Nothing is reported, and nothing is left in the home of who runs it.

EMBED = """
import sys
from PIL import Image
from cembed.runtime import Embedder
embedder = Embedder.load(sys.argv[1])
embedder.embed_query("total")
embedder.embed_image(Image.open(sys.argv[2]))
"""
REPORTS = {"ORT_DISABLE_TELEMETRY": "0"}


@dataclass(frozen=True)
class Watched:
    """A fresh home, and a command that runs there with nothing else in its environment: no sign of a CI either."""

    home: Path

    def run(self, *command: object, **more: str) -> list[str]:
        """The files that the command leaves in the home."""
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, env=environment | more)
        assert done.returncode == 0, done.stderr
        return sorted(path.name for path in self.home.rglob("*") if path.is_file())


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    (tmp_path / "home").mkdir()
    return Watched(tmp_path / "home")


@pytest.fixture
def commands(causal_bundle: Path, documents: Path, tmp_path: Path) -> dict[str, list[Any]]:
    vectors, page = tmp_path / "v.npz", GOLDEN / "causalqwen2_5" / "small.png"
    VectorFile.of([np.ones((1, 96), np.float32)], ["a"], [1], Bundle(causal_bundle).hash).save(vectors)
    lines = {
        "embedder": [EMBED, causal_bundle, page],
        "embed": [MAIN, "embed", causal_bundle, documents, "--out", tmp_path / "new.npz"],
        "search": [MAIN, "search", vectors, "total", "--bundle", causal_bundle],
        "index": [MAIN, "index", "add", tmp_path / "index", documents, "--bundle", causal_bundle],
        "verify": [MAIN, "verify", causal_bundle],
    }
    return {name: [sys.executable, "-c", *line] for name, line in lines.items()}


def has_reporter() -> bool:
    return tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 29)


@pytest.mark.parametrize("name", ["embedder", "embed", "search", "index", "verify"])
def test_nothing_is_left_at_home(watched: Watched, commands: dict[str, list[Any]], name: str) -> None:
    assert watched.run(*commands[name]) == []


@pytest.mark.skipif(not has_reporter(), reason="this ONNX Runtime reports nothing")
@pytest.mark.parametrize("name", ["embedder", "search"])
def test_who_wants_reports_has_them(watched: Watched, commands: dict[str, list[Any]], name: str) -> None:
    """So that the test above can fail."""
    assert "onnxruntime.db" in watched.run(*commands[name], **REPORTS)


def test_the_c_library_reports_nothing(
    watched: Watched, built: Path, onnxruntime_library: Path, causal_bundle: Path
) -> None:
    program, page = built / "samples" / "cembed-embed", GOLDEN / "causalqwen2_5" / "small.png"
    if not program.exists():
        pytest.skip("the samples are not built")
    library = {"CEMBED_ONNXRUNTIME": str(onnxruntime_library)}
    assert watched.run(program, causal_bundle, page, **library) == []
    if has_reporter():
        assert "onnxruntime.db" in watched.run(program, causal_bundle, page, **library, **REPORTS)


def strace() -> list[str] | None:
    """A command that shows the network calls of another; None where there is none, or it may not be used."""
    command = ["strace", "-f", "-qq", "-e", "trace=network"]
    try:
        return command if not subprocess.run([*command, "true"], capture_output=True).returncode else None
    except FileNotFoundError:
        return None


def internet(trace: Path) -> list[str]:
    return [line for line in trace.read_text().splitlines() if "AF_INET" in line or "sendto(" in line]


@pytest.mark.skipif(strace() is None, reason="no strace")
@pytest.mark.parametrize("name", ["embedder", "search"])
def test_nobody_is_asked_or_told(watched: Watched, commands: dict[str, list[Any]], tmp_path: Path, name: str) -> None:
    watcher = [*(strace() or []), "-o", tmp_path / "trace"]
    watched.run(*watcher, *commands[name])
    assert internet(tmp_path / "trace") == []
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    watched.run(*watcher, sys.executable, "-c", code)
    assert internet(tmp_path / "trace"), "such a call would have been seen"


REPORTER = """
import pathlib
class Telemetry:
    def __init__(self, *values, **more): pathlib.Path.home().joinpath("told").touch()
    def send_event(self, *values, **more): pass
"""


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("import openvino", ["told"]),
        ("from cembed.runtime.engines import quiet; quiet.import_openvino()", []),
        (
            "import openvino_telemetry; from cembed.runtime.engines import quiet; quiet.import_openvino()",
            ["told"],
        ),
        (
            "from cembed.runtime.engines import quiet; quiet.import_openvino(); import openvino_telemetry.backend",
            [],
        ),
    ],
    ids=["by itself", "by us", "if it is there already", "it can be imported afterwards"],
)
def test_openvino_reports_nothing(watched: Watched, tmp_path: Path, code: str, left: list[str]) -> None:
    """With a reporter that only leaves a file: the real one sends what it knows."""
    pytest.importorskip("openvino")
    (tmp_path / "fake" / "openvino_telemetry" / "backend").mkdir(parents=True)
    (tmp_path / "fake" / "openvino_telemetry" / "__init__.py").write_text(REPORTER)
    (tmp_path / "fake" / "openvino_telemetry" / "backend" / "__init__.py").write_text("backend_ga4 = None")
    first = f"import sys; sys.path.insert(0, {str(tmp_path / 'fake')!r}); {code}"
    assert watched.run(sys.executable, "-c", first) == left


def test_libraries_that_report_are_imported_in_one_place() -> None:
    folders = ("cembed", "export", "quantize", "runtime", "bench", "samples", "tests", "docs")
    found = re.compile(r"^\s*(?:import|from) (?:onnxruntime|openvino)\b(?!\.quantization)", re.MULTILINE)
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    importing = {path for path in sources if found.search(path.read_text(encoding="utf-8"))}
    assert importing == {ROOT / "runtime" / "engines" / "quiet.py"}


# Packaging.


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git has or would add."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!tests"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    copy = tmp_path_factory.mktemp("build") / "tree"
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def build(kind: str, tree: Path) -> Path:
    out = tree.parent / kind
    code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, f"build_{kind}", str(out)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """The sdist, unpacked."""
    archive = build("sdist", tree)
    with tarfile.open(archive) as file:
        file.extractall(tree.parent / "unpacked", filter="data")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel built from the sdist, as an installer would, unpacked."""
    with zipfile.ZipFile(build("wheel", sdist)) as file:
        file.extractall(sdist.parent / "installed")
    return sdist.parent / "installed"


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_the_listed_packages_are_the_folders_with_code(tree: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(tree).as_posix() for path in tree.rglob("*.py")}
    packages = {folder for folder in folders if folder.split("/")[0] in FOLDERS.values()}
    assert {name.replace(".", "/"): folder for name, folder in listed["package-dir"].items()} == FOLDERS
    assert {name.replace(".", "/") for name in listed["packages"]} == set(SOURCES)
    assert packages == set(SOURCES.values())


@pytest.mark.parametrize(("package", "source"), SOURCES.items())
def test_every_module_is_in_sdist_and_wheel(tree: Path, sdist: Path, wheel: Path, package: str, source: str) -> None:
    expected = modules(tree / source)
    assert "__init__.py" in expected
    assert modules(sdist / source) == expected
    assert modules(wheel / package) == expected


def test_kernels_for_gpus_are_in_sdist_and_wheel(sdist: Path, wheel: Path) -> None:
    """As text: they are compiled where they run."""
    for folder in (sdist / "runtime", wheel / "cembed" / "runtime"):
        assert {path.name for path in folder.glob("native/cuda/*")} == set(gpu.FILES)


def test_type_information_and_licence_are_in_sdist_and_wheel(sdist: Path, wheel: Path) -> None:
    for archive in (sdist, wheel):
        assert (archive / "cembed" / "py.typed").exists()
    assert (sdist / "LICENSE").exists()
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"cembed"}


def test_the_wheel_asks_for_no_torch(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    needed = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist: ")]
    plain = [line for line in needed if "extra ==" not in line]
    assert any("onnxruntime" in line for line in plain)
    assert not [line for line in plain if any(name in line.split() for name in HEAVY)]
    (scripts,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "cembed = cembed.cli:main" in scripts.read_text()


def test_the_wheel_runs(wheel: Path, causal_bundle: Path) -> None:
    code = f"import cembed, sys; assert cembed.__file__.startswith({str(wheel)!r}), cembed.__file__; {MAIN}"
    done = python(code, "inspect", causal_bundle, "--json", cwd=wheel, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backbone"] == "qwen2.5-vl"
