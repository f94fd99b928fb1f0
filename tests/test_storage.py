"""Storage types are rows of one table, whose order means nothing, and C++ has the same rows."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import Current, read_current
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.search import Stage, make_plan
from cembed.runtime.index.verify import verify_index
from cembed.runtime.scoring import gpu, kernels
from cembed.runtime.scoring.kernels import Pages
from cembed.runtime.scoring.storage import DOUBLE, STORAGE, Storage, by_exactness, check_dim

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "runtime" / "native"
ORDERS = list(permutations(STORAGE))[1::5]
DIM = 16


@pytest.fixture(params=ORDERS, ids="-".join)
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """The table in another order."""
    table = cast(dict[str, Storage], STORAGE)
    rows = dict(table)
    table.clear()
    table.update({name: rows[name] for name in request.param})
    yield
    table.clear()
    table.update(rows)


def vectors(seed: int, rows: int = 5) -> NDArray[np.float32]:
    found = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def stored(name: str) -> Pages:
    encoded = [STORAGE[name].encode(vectors(seed)) for seed in range(4)]
    starts = np.arange(4, dtype=np.int64) * len(encoded[0][0])
    data, scales = np.concatenate([data for data, _ in encoded]), np.array([s for _, s in encoded], np.float32)
    return Pages(name, DIM, data, starts, np.full(4, 5, np.int32), scales)


def made(folder: Path) -> Index:
    index = Index.create(folder, dim=DIM, bundle="b", storage=["bits", "u8", "f16", "f32"])
    index.add([NewPage(f"p{seed}", vectors(seed)) for seed in range(30)], bundle="b")
    return index


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What comes out in the order that the table has."""
    folder = tmp_path_factory.mktemp("before") / "index"
    scores: dict[str, Any] = {name: kernels.score(vectors(99), stored(name)) for name in STORAGE}
    with made(folder) as index:
        return scores | {"found": found(index)}, folder


def found(index: Index) -> list[tuple[str, float]]:
    plans: list[tuple[Stage, ...] | None] = [
        None,
        make_plan(index.tiers, 1 << 40, 3),
        (Stage("u8", 9), Stage("f16", 4)),
    ]
    return [(hit.id, hit.score) for plan in plans for hit in index.search(vectors(99), 3, plan=plan).hits]


def test_an_index_is_the_same_in_every_order(
    shuffled: None, before: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    expected, folder = before
    with made(tmp_path / "index") as index:
        assert index.tiers == ("f32", "f16", "u8", "bits")
        assert found(index) == expected["found"]
        assert [(s.tier, s.keep) for s in make_plan(index.tiers, 1 << 40, 3)] == [
            ("bits", 1000),
            ("u8", 100),
            ("f32", 3),
        ]
        index.remove(["p3"])
        index.compact()
    assert all(check.passed for check in verify_index(tmp_path / "index"))
    with Index.open(folder) as old:
        assert found(old) == expected["found"]


def test_scores_are_the_same_in_every_order(
    shuffled: None, before: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STORAGE:
        assert np.array_equal(kernels.score(vectors(99), stored(name)), before[0][name])
    monkeypatch.setattr(kernels, "load", lambda: None)
    for name in STORAGE:
        np.testing.assert_allclose(kernels.score(vectors(99), stored(name)), before[0][name], rtol=1e-5)


def test_messages_and_choices_are_the_same_in_every_order(shuffled: None, tmp_path: Path) -> None:
    assert by_exactness() == ("f32", "f16", "u8", "bits")
    assert gpu.STORED == ("f16", "u8")
    with pytest.raises(CembedError, match=r"unknown storage 'f8': cembed has f32, f16, u8, bits$"):
        check_dim("f8", 8)
    with pytest.raises(CembedError, match=r"as bits: a multiple of 8 is needed"):
        Index.create(tmp_path / "index", dim=12, bundle="b", storage=["f32", "bits"])
    for tiers in (("u8", "f32"), ("f32", "f32"), ("f32", "f8"), ()):
        with pytest.raises(CembedError, match="storage types"):
            Current("i", DIM, tiers, "b", (1,), 2, 0)


def test_codes_and_ranks_are_each_one_types() -> None:
    assert len({DOUBLE, *(row.code for row in STORAGE.values())}) == len(STORAGE) + 1
    assert len({row.exactness for row in STORAGE.values()}) == len(STORAGE)
    assert sum(row.has_scale for row in STORAGE.values()) <= 1, "an index keeps one scale for each page"


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tests" / "native" / "shared_tables.py"))


def test_the_headers_are_what_python_has(generator: dict[str, Any]) -> None:
    for path, text in generator["headers"]().items():
        assert path.read_text(encoding="utf-8") == text, "run python tests/native/shared_tables.py"


def test_the_headers_are_the_same_in_every_order(shuffled: None, generator: dict[str, Any]) -> None:
    test_the_headers_are_what_python_has(generator)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("backwards", [False, True])
def test_the_compiled_rows_are_those_of_python(tmp_path: Path, generator: dict[str, Any], backwards: bool) -> None:
    """As the kernels find them: by code and by member, in whatever order they stand."""
    header, members = (
        tmp_path / "storage.h",
        ("exactness", "bits", "dim_step", "query_limit", "has_scale", "signs", "screens"),
    )
    lines = generator["headers"]()[NATIVE / "storage.h"].splitlines()
    rows = [number for number, line in enumerate(lines) if line.startswith('    {"')]
    assert len(rows) == len(STORAGE)
    if backwards:
        lines[rows[0] : rows[-1] + 1] = lines[rows[0] : rows[-1] + 1][::-1]
    header.write_text("\n".join(lines))
    shown = " << ' ' << ".join(f"int(maxsim::row_of(maxsim::STORAGE, code).{member})" for member in members)
    codes = ", ".join(str(row.code) for row in STORAGE.values())
    (tmp_path / "rows.cpp").write_text(
        f'#include <iostream>\n#include "{header}"\n#include "{NATIVE / "query.h"}"\nint main() {{\n'
        f"for (const int code : {{{codes}}}) std::cout << maxsim::row_of(maxsim::STORAGE, code).name << ' ' << {shown} "
        "<< ' ' << maxsim::row_of(maxsim::WORK, code).worth << '\\n'; }\n"
    )
    program = tmp_path / "rows"
    subprocess.run(["c++", "-std=c++17", tmp_path / "rows.cpp", "-o", program], check=True)
    for line, (name, row) in zip(
        subprocess.check_output([program], text=True).splitlines(), STORAGE.items(), strict=True
    ):
        found, *values, worth = line.split()
        assert found == name
        assert dict(zip(members, map(int, values), strict=True)) == {m: int(vars(row)[m] or 0) for m in members}
        assert int(worth) > 0


def test_kernels_of_a_gpu_have_the_numbers_of_python() -> None:
    text = (NATIVE / "cuda" / "maxsim.h").read_text(encoding="utf-8")
    for name, value in (("Warps", gpu._WARPS), ("Step", gpu._STEP), ("Sorted", gpu._SORTED)):
        assert f"constexpr int kMaxSim{name} = {value};" in text
    assert f"constexpr int kMaxSimRing = 1 << {gpu._RING.bit_length() - 1};" in text


def test_current_names_a_dim_that_its_types_cannot_have(tmp_path: Path) -> None:
    """As libcembed does: such an index was never made."""
    with made(tmp_path / "index"):
        pass
    current = read_current(tmp_path / "index")
    raw = current.encode().rpartition(b" ")[0].replace(b'"dim": 16', b'"dim": 12')
    (tmp_path / "index" / "CURRENT").write_bytes(raw + b" %08x\n" % zlib.crc32(raw))
    with pytest.raises(CembedError, match="CURRENT is damaged: vectors of dim 12 as bits"):
        Index.open(tmp_path / "index")
