"""The C library for others: versions, symbols, projects that find it where it was installed, the service."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import libcembed
import numpy as np
import pytest
from conftest import GOLDEN
from libcembed import Bundle, Library, run

import cembed
from cembed.runtime import Embedder
from cembed.runtime.bundle.manifest import SCHEMA_VERSION

CONSUMER = libcembed.ROOT / "tests" / "consumer"
TEXT = "warranty period"
API = [
    "abi_version",
    "close",
    "embed_image",
    "embed_query",
    "error",
    "extend",
    "get_info",
    "hits_free",
    "index_close",
    "index_get_info",
    "index_open",
    "index_search",
    "index_search_filtered",
    "kernels",
    "load",
    "maxsim",
    "open",
    "open_trusted",
    "schema_version",
    "start_image",
    "start_query",
    "state_close",
    "vectors_free",
    "version",
]


def test_versions(library: Library, causal: Bundle, causal_bundle: Path) -> None:
    assert library.dll.cembed_abi_version() == libcembed.ABI_VERSION
    assert library.dll.cembed_version().decode() == cembed.__version__
    assert library.dll.cembed_schema_version() == SCHEMA_VERSION
    assert library.dll.cembed_kernels(0)
    assert library.dll.cembed_kernels(99) is None
    info, embedder = causal.info, Embedder.load(causal_bundle)
    assert (info.hash.decode(), info.backbone.decode()) == (embedder.bundle.hash, "qwen2.5-vl")
    assert (info.document_vectors, info.document_dim, info.query_vectors, info.query_dim) == (8, 96, 4, 96)


def test_it_shows_the_api_and_nothing_else(built: Path) -> None:
    lines = run("nm", "-D", "--defined-only", built / "libcembed.so").splitlines()
    assert sorted(line.split()[-1] for line in lines) == [f"cembed_{name}" for name in sorted(API)]


@pytest.fixture(scope="session")
def prefix(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built, "--prefix", folder)
    return folder


@pytest.fixture(scope="session")
def consumers(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Programs in C and C++, by find_package and by pkg-config."""
    folder: Path = tmp_path_factory.mktemp("consumer")
    shutil.copytree(CONSUMER, folder / "source")
    run("cmake", "-S", folder / "source", "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", folder / "build")
    made = [folder / "build" / "consumer_c", folder / "build" / "consumer_cpp"]
    if shutil.which("pkg-config"):
        (places,) = {str(path.parent) for path in prefix.rglob("cembed.pc")}
        flags = run("pkg-config", "--cflags", "--libs", "cembed", PKG_CONFIG_PATH=places).split()
        for compiler, source in (("cc", "consumer.c"), ("c++", "consumer.cpp")):
            made.append(folder / f"{compiler}.out")
            standard = "-std=c99" if compiler == "cc" else "-std=c++17"
            run(compiler, standard, folder / "source" / source, *flags, "-o", made[-1])
    return made


def test_a_project_elsewhere(
    consumers: list[Path], prefix: Path, causal_bundle: Path, onnxruntime_library: Path
) -> None:
    vectors = Embedder.load(causal_bundle).embed_query(TEXT)
    (libraries,) = {str(path.parent) for path in prefix.rglob("libcembed.so")}
    variables = {"LD_LIBRARY_PATH": libraries, "CEMBED_ONNXRUNTIME": str(onnxruntime_library)}
    for consumer in consumers:
        rows, dim, total = run(consumer, causal_bundle, TEXT, **variables).split()
        assert (int(rows), int(dim)) == vectors.shape
        assert float(total) == pytest.approx(float(vectors.sum()), abs=1e-4)
        failed = subprocess.run(
            [consumer, "/nowhere", TEXT], capture_output=True, text=True, env={**os.environ, **variables}
        )
        assert failed.returncode == 1
        assert "not a bundle" in failed.stderr


ARM = Path(os.environ.get("CEMBED_ARM64", "/nowhere"))  # as samples/cpp/README.md says how it is made
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(
    not ARM.exists(), reason="CEMBED_ARM64 names no folder with libcrypto, zlib and ONNX Runtime for arm64"
)
@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not QEMU, reason="no g++-aarch64-linux-gnu, or no qemu-user"
)
def test_it_is_built_for_arm64_and_runs(causal_bundle: Path, tmp_path: Path) -> None:
    toolchain = libcembed.ROOT / "runtime" / "native" / "cmake" / "aarch64.cmake"
    root = f"-DCMAKE_FIND_ROOT_PATH={ARM}", f"-DONNXRUNTIME_ROOT={os.environ.get('ONNXRUNTIME_ROOT', '')}"
    run("cmake", "-S", toolchain.parents[1], "-B", tmp_path, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", *root)
    run("cmake", "--build", tmp_path, "--parallel", "2")
    include = f"-I{toolchain.parents[1] / 'include'}"
    shared = f"-L{tmp_path}", "-lcembed", "-Wl,--allow-shlib-undefined", "-o", tmp_path / "consumer"
    run("aarch64-linux-gnu-gcc", include, CONSUMER / "consumer.c", *shared)
    places = ":".join(map(str, [tmp_path, *(ARM / part / "aarch64-linux-gnu" for part in ("lib", "usr/lib"))]))
    engine = next(ARM.glob("onnxruntime/capi/libonnxruntime.so*"))
    environment = "-E", f"LD_LIBRARY_PATH={places}", "-E", f"CEMBED_ONNXRUNTIME={engine}"
    rows, dim, total = run(str(QEMU), "-L", ARM, *environment, tmp_path / "consumer", causal_bundle, TEXT).split()
    vectors = Embedder.load(causal_bundle).embed_query(TEXT)
    assert (int(rows), int(dim)) == vectors.shape
    assert float(total) == pytest.approx(float(vectors.sum()), abs=1e-4)


class Service:
    """cembed-service with one caller and four places to wait."""

    def __init__(self, program: Path, bundle: Path, engine: Path) -> None:
        self.port = 18080 + os.getpid() % 4000
        command = [program, bundle, str(self.port), "1", "4", "20"]
        variables = {**os.environ, "CEMBED_ONNXRUNTIME": str(engine)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=variables)
        assert self.process.stdout is not None
        assert b"listening" in self.process.stdout.readline()

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def service(built: Path, causal_bundle: Path, onnxruntime_library: Path) -> Iterator[Service]:
    if lacking := libcembed.missing(libcembed.SAMPLE_HEADERS):
        pytest.skip(f"the samples are not built: {lacking}")
    service = Service(built / "samples" / "cembed-service", causal_bundle, onnxruntime_library)
    yield service
    service.process.kill()
    service.process.wait()


def test_the_service(service: Service, causal_bundle: Path) -> None:
    embedder, picture = Embedder.load(causal_bundle), (GOLDEN / "causalqwen2_5" / "page.png").read_bytes()
    status, body = service.ask("POST", "/embed", TEXT.encode(), "text/plain")
    assert status == 200
    np.testing.assert_allclose(np.frombuffer(body, "<f4"), embedder.embed_query(TEXT).reshape(-1), rtol=0, atol=1e-6)
    assert len(service.ask("POST", "/embed", picture, "image/png")[1]) == 4 * 8 * 96
    for kind, wrong, expected in (("image/png", b"no", 422), ("text/plain", b"<|im_end|>", 422), ("a/b", b"", 415)):
        assert service.ask("POST", "/embed", wrong, kind)[0] == expected
    assert service.ask("GET", "/health") == (200, b"ok\n")
    assert b'cembed_answers_total{status="422"} 2' in service.ask("GET", "/metrics")[1]


def test_the_service_refuses_what_is_too_much_and_drains(service: Service) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.extend(service.ask("POST", "/embed", TEXT.encode(), "text/plain")[0] for _ in range(20))

    callers = [threading.Thread(target=ask) for _ in range(24)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert set(statuses) == {200, 429}
    assert service.ask("POST", "/embed", TEXT.encode(), "text/plain")[0] == 200
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=30) == 0
