"""Rows and parts, on this machine, on a Ray cluster of two nodes, and in Daft: every page a row, none twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from serving import SAMPLE, load_sample, sample_pages

from cembed.runtime import Bundle, PageError, PageReader
from cembed.runtime.errors import CembedError
from cembed.runtime.page_vectors import embed_documents
from cembed.runtime.scoring.storage import STORAGE
from cembed.scale import SUFFIXES
from cembed.scale import parts as parts_module
from cembed.scale.embed import Files, PageEmbedder, PageSplitter, WorkerOptions, find_sources
from cembed.scale.parts import Done, Parts, open_store
from cembed.scale.plan import OVERHEAD
from cembed.scale.rows import KEY_BYTES, Row, RowSchema

SETTINGS = "[null, null, 1, null, 144]"
STORED = [name for name, storage in STORAGE.items() if storage.bits >= 8]


def schema(storage: str = "f32", dim: int = 256) -> RowSchema:
    return RowSchema(dim, Bundle(SAMPLE, verify=False).hash, SETTINGS, storage)


def read(out: Path) -> list[Row]:
    store = open_store(out)
    found = store.schema()
    assert found is not None
    return [row for batch in store.batches() for row in found.rows(batch)]


def rows_of_many(count: int, dim: int = 16) -> list[Row]:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((count, 3, dim)).astype(np.float32)
    made = [
        Row(f"{i}.pdf", i + 1, f"{i:064x}", vectors[i, : 1 + i % 3], warning="w" if i % 5 else None)
        for i in range(count)
    ]
    return [*made, Row("bad.pdf", None, "", error="it is empty"), Row("bad.pdf", 3, "ab" * 32, error="damaged")]


# Rows and parts.


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_come_back(tmp_path: Path, storage: str, suffix: str) -> None:
    out = tmp_path / f"rows{suffix}"
    made = rows_of_many(20)
    with Parts(open_store(out), RowSchema(16, "b", "[]", storage)) as parts:
        assert all(parts.add(row) for row in made)
        assert not any(parts.add(row) for row in made)
    found = read(out)
    for before, after in zip(made, found, strict=True):
        texts = [(row.path, row.page, row.sha256, row.warning, row.error) for row in (before, after)]
        assert texts[0] == texts[1]
        if before.vectors is None:
            assert after.vectors is None
        else:
            assert np.array_equal(STORAGE[storage].restore(before.vectors), after.vectors)  # type: ignore[arg-type]


def test_columns_are_what_other_programs_read(tmp_path: Path) -> None:
    with Parts(open_store(tmp_path / "rows.parquet"), RowSchema(16, "b", "[]", "f16")) as parts:
        for row in rows_of_many(3):
            parts.add(row)
    table = next(iter(open_store(tmp_path / "rows.parquet").batches()))
    assert table.schema.field("vectors").type == pa.list_(pa.list_(pa.float16(), 16))
    assert table.column("error").to_pylist() == [None, None, None, "it is empty", "damaged"]
    assert table.column("page").to_pylist() == [1, 2, 3, None, 3]
    assert len(set(table.column("key").to_pylist())) == 5


def test_parts_go_on_where_a_run_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_ROWS", 4)
    out, made = tmp_path / "rows.parquet", rows_of_many(20)
    monkeypatch.setattr(parts_module, "NEW_KEYS", 7)
    with Parts(open_store(out), RowSchema(16, "b", "[]")) as parts:
        for row in made[:10]:
            parts.add(row)
    (out / "part-00000009.parquet.tmp").write_bytes(b"of a killed run")
    schema = RowSchema(16, "b", "[]")
    with Parts(open_store(out), schema) as parts:
        assert parts.add_batch(schema.batch(made[5:])) == len(made) - 10
        assert parts.add_batch(schema.batch(made)) == 0
    assert Counter(row.path for row in read(out)) == Counter(row.path for row in made)
    assert not list(out.glob("*.tmp"))
    with pytest.raises(CembedError, match="another storage"):
        Parts(open_store(out), RowSchema(16, "b", "[]", "f16"))
    with pytest.raises(CembedError, match="another bundle"):
        Parts(open_store(out), RowSchema(16, "c", "[]"))
    (tmp_path / "other.parquet").mkdir()
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet" / "part-00000000.parquet")
    with pytest.raises(CembedError, match="not a table of cembed"):
        Parts(open_store(tmp_path / "other.parquet"), schema)


def test_keys_are_found_in_a_file_that_is_mapped() -> None:
    random = np.random.default_rng(1)
    keys = random.integers(0, 256, (5000, KEY_BYTES), np.uint8)
    keys[::7, -1] = 0  # zeros at the end, which numpy's bytes leave out
    stored = keys.view(f"S{KEY_BYTES}").reshape(-1)
    done = Done([stored[:2000], stored[2000:]])
    assert isinstance(done.keys, np.memmap)
    assert len(done) == 5000
    assert all(key.tobytes() in done for key in keys[:200])
    assert not any(random.bytes(KEY_BYTES) in done for _ in range(200))
    assert len(Done([])) == 0
    assert b"x" * KEY_BYTES not in Done([])


@pytest.mark.parametrize(("name", "says"), [("rows.csv", "parquet or"), ("nowhere://x/rows.parquet", "nowhere")])
def test_where_rows_cannot_go(name: str, says: str) -> None:
    with pytest.raises(CembedError, match=says):
        open_store(name)


def test_types_that_arrow_lacks_are_refused() -> None:
    with pytest.raises(CembedError, match="cannot be stored"):
        schema(next(name for name, storage in STORAGE.items() if storage.bits < 8))


# Pages.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages, a PDF of three, and poison: no PDF, an empty file, a picture of 10 gigapixels."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sample_pages(9):
        shutil.copy(path, folder)
    from PIL import Image

    pages = [Image.open(path).convert("RGB") for path in sample_pages(3)]
    pages[0].save(folder / "three.pdf", save_all=True, append_images=pages[1:])
    poison(folder, 1)
    return folder


def poison(folder: Path, count: int) -> None:
    """So many files of each kind of poison."""
    for i in range(count):
        (folder / f"empty-{i}.png").touch()
        (folder / f"broken-{i}.pdf").write_bytes(b"%PDF-1.7\nnothing")
        (folder / f"bomb-{i}.png").write_bytes(bomb())


def bomb() -> bytes:
    """A PNG that says that it has 100,000 x 100,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[tuple[str, int | None], Any]:
    """Vectors as `cembed embed` makes them, or why there are none."""
    found = {}
    for page in embed_documents(load_sample_one_thread(), [corpus]):
        value = page.reason if isinstance(page, PageError) else page.vectors
        found[os.path.abspath(page.path), page.number] = value
    return found


def load_sample_one_thread() -> Any:
    return WorkerOptions(str(SAMPLE), schema=schema()).load()


def compare(rows: Sequence[Row], expected: dict[tuple[str, int | None], Any]) -> None:
    """Every page a row, none twice, with the same vectors bit for bit, or the same reason."""
    assert Counter((os.path.abspath(row.path), row.page) for row in rows) == Counter(expected.keys())
    for row in rows:
        value = expected[os.path.abspath(row.path), row.page]
        if isinstance(value, str):
            assert (row.error, row.vectors) == (value, None)
        else:
            assert row.error is None
            assert np.array_equal(row.vectors, value)  # type: ignore[arg-type]


def test_a_splitter_and_an_embedder_do_it_all(corpus: Path, expected: dict[Any, Any]) -> None:
    options = WorkerOptions(str(SAMPLE), schema=schema())
    splitter = PageSplitter(options, np.empty(0, f"S{KEY_BYTES}"))
    pages = splitter({"path": sorted(map(str, corpus.iterdir()))})
    table = PageEmbedder(options)(pages)
    rows = list(schema().rows(table))
    compare(rows, expected)
    half = np.sort(np.array([row.key(SETTINGS) for row in rows[::2]], f"S{KEY_BYTES}"))
    left = PageSplitter(options, half)({"path": sorted(map(str, corpus.iterdir()))})
    assert len(left["path"]) == len(rows) - len(half)


def test_documents_in_a_column_of_bytes(corpus: Path, expected: dict[Any, Any]) -> None:
    files = sorted(path for path in corpus.iterdir() if path.suffix in (".pdf", ".jpg"))
    given = {"path": list(map(str, files)), "bytes": [path.read_bytes() for path in files]}
    rows = list(schema().rows(PageEmbedder(WorkerOptions(str(SAMPLE), schema=schema()))(given)))
    here = {os.path.abspath(path) for path in files}
    compare(rows, {key: value for key, value in expected.items() if key[0] in here})


def test_a_file_that_changes_between_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "page.jpg"
    shutil.copy(sample_pages(1)[0], file)
    options = WorkerOptions(str(SAMPLE), schema=schema())
    pages = PageSplitter(options, np.empty(0, f"S{KEY_BYTES}"))({"path": [str(file)]})
    embedder = PageEmbedder(options)
    shutil.copy(sample_pages(2)[1], file)
    assert next(schema().rows(embedder(pages))).error == "was changed while it was being read"
    file.unlink()
    assert "No such file" in str(next(schema().rows(embedder(pages))).error)


def test_uris_are_listed_and_fetched(corpus: Path) -> None:
    found = find_sources([f"file://{corpus}"])
    assert len(found) == len(list(corpus.iterdir()))
    files = Files()
    here, sha256 = files.open(found[0])
    assert here != found[0]
    assert Path(here).read_bytes() == (corpus / Path(found[0]).name).read_bytes()
    assert files.open(found[0]) == (here, sha256)
    files.open(found[1])
    assert not Path(here).exists()
    with pytest.raises(CembedError, match="nowhere"):
        find_sources(["file:///nowhere"])


# The command.


def cembed(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cembed", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode in (0, 3), done.stderr
    return done


def test_embed_writes_parts_and_goes_on_after_a_kill(tmp_path: Path, corpus: Path, expected: dict[Any, Any]) -> None:
    out = tmp_path / "rows.parquet"
    command = ["embed", SAMPLE, corpus, "--out", out, "--threads", 1]
    for seconds in (0.9, 1.2):
        process = subprocess.Popen([sys.executable, "-m", "cembed", *map(str, command)], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL if seconds < 1.0 else signal.SIGINT)
        process.wait()
    cembed(*command)
    compare(read(out), expected)
    again = cembed(*command)
    assert f"0 rows added, {len(expected)} were there" in again.stdout
    assert again.returncode == 0
    fresh = cembed(*command[:-4], "--out", tmp_path / "fresh.lance")
    assert fresh.returncode == 3
    assert "not embedded" in fresh.stderr
    compare(read(tmp_path / "fresh.lance"), expected)
    refused = cembed(*command, "--dim", 64, check=False)
    assert refused.returncode == 1
    assert "another dim, settings" in refused.stderr
    refused = cembed(*command[:-4], "--out", tmp_path / "x.npz", "--cluster", "auto", check=False)
    assert "x.parquet" in refused.stderr


def test_a_plan_is_arithmetic_of_what_was_measured(corpus: Path) -> None:
    import json

    command = ("scale", "plan", corpus, "--bundle", SAMPLE, "--pages", 1_000_000, "--sample", 4, "--nodes", "1,10")
    found = json.loads(cembed(*command, "--cores", 8, "--price", 2, "--json").stdout)
    seconds = found["measured"]["read_seconds"] + found["measured"]["embed_seconds"]
    assert found["core_hours"] == pytest.approx(1_000_000 * (seconds + OVERHEAD) / 3600 / 0.95)
    one, ten = found["nodes"]
    assert one["hours"] == pytest.approx(found["core_hours"] / 8, rel=0.01)
    assert ten["hours"] == pytest.approx(one["hours"] / 10, abs=0.02)
    assert one["cost"] == pytest.approx(2 * one["hours"], abs=0.02)
    sizes = {row["what"]: row["bytes a page"] for row in found["disk"]}
    assert sizes["index, f16"] == 32 * 256 * 2
    assert 32 * 256 * 4 < sizes["rows, f32"] < 32 * 256 * 4 + 400
    refused = cembed(*command, "--nodes", "0", check=False)
    assert "numbers of nodes" in refused.stderr


# Clusters.

DRIVER = """
import os, sys
from cembed.scale import cluster
from cembed.cli import main
sys.argv = ["cembed", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """Two nodes of two CPUs."""
    pytest.importorskip("ray")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def test_a_cluster_loses_a_node_and_its_driver(
    tmp_path: Path, corpus: Path, expected: dict[Any, Any], ray_cluster: Any
) -> None:
    """No page is lost or there twice; vectors are those of one machine."""
    out = tmp_path / "rows.parquet"
    command = [sys.executable, "-c", DRIVER, "embed", SAMPLE, corpus, "--out", out, "--cluster", ray_cluster.address]
    first = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    time.sleep(9)
    first.kill()
    first.wait()
    second = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(6)
    ray_cluster.remove_node(next(node for node in ray_cluster.list_all_nodes() if not node.head))
    said, wrong = second.communicate(timeout=240)
    assert second.returncode in (0, 3), wrong
    assert "rows added" in said
    compare(read(out), expected)


@pytest.mark.skipif(os.environ.get("CEMBED_SCALE") != "long", reason="CEMBED_SCALE=long runs it: minutes")
@pytest.mark.parametrize("engine", ["ray", "daft"])
def test_two_thousand_pages(tmp_path: Path, ray_cluster: Any, engine: str) -> None:
    """With 1 % poison; on Ray the driver is killed, and then a node. The memory of workers stays where it is."""
    import psutil

    folder, out = tmp_path / "corpus", tmp_path / "rows.parquet"
    folder.mkdir()
    pages = sample_pages(60)
    for i in range(1980):
        shutil.copy(pages[i % 60], folder / f"{i:05d}.jpg")
    poison(folder, 7)
    one = {path.name: rows for path, rows in zip(pages, embedded(pages), strict=True)}
    started, used = time.monotonic(), list[float]()
    if engine == "ray":
        ray_cluster.add_node(num_cpus=2)
        command = [
            sys.executable,
            "-c",
            DRIVER,
            "embed",
            SAMPLE,
            folder,
            "--out",
            out,
            "--cluster",
            ray_cluster.address,
        ]
        for ends in (25.0, None):
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            began = time.monotonic()
            while process.poll() is None:
                time.sleep(1)
                workers = [
                    p for p in psutil.process_iter(["name"]) if "ray::MapWorker(MapBatches(PageEmbedder" in p.name()
                ]
                used += [max(p.memory_info().rss for p in workers) / 2**20] if workers else []
                if ends and time.monotonic() > began + ends:
                    process.kill()
                elif ends is None and 20 < time.monotonic() - began < 21.5 and len(ray_cluster.list_all_nodes()) > 1:
                    ray_cluster.remove_node(next(node for node in ray_cluster.list_all_nodes() if not node.head))
            process.wait()
        assert max(used[len(used) // 4 :]) < 1.15 * np.median(used[len(used) // 4 :])
    else:
        import daft

        from cembed.scale.frames import batches, embed_frame

        options = WorkerOptions(str(SAMPLE), schema=schema())
        with Parts(open_store(out), schema()) as parts:
            frame = embed_frame(daft.from_pydict({"path": sorted(map(str, folder.iterdir()))}), options, 2)
            for batch in batches(frame, options):
                parts.add_batch(batch)
    rows = read(out)
    print(f"{engine}: {len(rows)} rows, {time.monotonic() - started:.0f} s, worker {max(used, default=0):.0f} MiB")
    assert Counter(Path(row.path).name for row in rows) == Counter(path.name for path in folder.iterdir())
    assert sum(row.error is not None for row in rows) == 21
    for row in rows:
        if row.error is None:
            name = pages[int(Path(row.path).stem) % 60].name
            assert np.array_equal(row.vectors, one[name])  # type: ignore[arg-type]


def embedded(pages: Sequence[Path]) -> list[Any]:
    return [page.vectors for page in embed_documents(load_sample_one_thread(), pages)]  # type: ignore[union-attr]


def test_daft(tmp_path: Path, corpus: Path, expected: dict[Any, Any]) -> None:
    daft = pytest.importorskip("daft")
    from cembed.scale.frames import batches, embed_frame

    options = WorkerOptions(str(SAMPLE), schema=schema())
    files = sorted(map(str, corpus.iterdir()))
    added = []
    for _ in range(2):
        with Parts(open_store(tmp_path / "rows.parquet"), schema()) as parts:
            frame = embed_frame(daft.from_pydict({"path": files}), options, 1, parts.done.keys)
            added.append(sum(parts.add_batch(batch) for batch in batches(frame, options)))
    assert added == [len(expected), 0]
    compare(read(tmp_path / "rows.parquet"), expected)


def test_the_decoding_process_may_die(corpus: Path) -> None:
    """A reader that loses its process goes on with the next page."""
    with PageReader() as reader:
        assert reader.pages_of(corpus / "three.pdf") == 3
        page, pages = reader.page(corpus / "three.pdf", 2)
        assert (page.number, pages) == (2, 3)
        beyond, _ = reader.page(corpus / "three.pdf", 4)
        assert isinstance(beyond, PageError)
        reader._worker._process.kill()  # type: ignore[union-attr]
        lost, _ = reader.page(corpus / "three.pdf", 3)
        assert isinstance(lost, PageError) or lost.number == 3
        again, _ = reader.page(corpus / "three.pdf", 3)
        assert not isinstance(again, PageError)
        assert reader.pages_of(corpus / "nowhere.pdf") == 0


def test_the_sample_is_loaded_as_the_library_does() -> None:
    assert load_sample().bundle.hash == schema().bundle
