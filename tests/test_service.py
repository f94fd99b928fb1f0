"""The C++ samples: pictures, the service's answers and refusals, the service under load and under attack."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import libcembed
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import ExifTags, Image

from cembed.runtime import Embedder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples" / "cpp"))
import attack
import load

Start: TypeAlias = Callable[..., load.Service]


@pytest.fixture(scope="module")
def samples(built: Path) -> Path:
    if lacking := libcembed.missing(libcembed.SAMPLE_HEADERS):
        pytest.skip(f"the samples are not built: {lacking}")
    return built / "samples"


@pytest.fixture(scope="module")
def start(samples: Path, causal_bundle: Path, onnxruntime_library: Path) -> Iterator[Start]:
    """Starts a service with arguments that follow the port."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEMBED_ONNXRUNTIME", str(onnxruntime_library))

        def begin(*arguments: object) -> load.Service:
            program = samples / "cembed-service"
            return stack.enter_context(load.Service(program, causal_bundle, "text/plain", b"warranty", arguments))

        yield begin


@pytest.fixture(scope="module")
def service(start: Start) -> load.Service:
    return start()


def talk(service: load.Service, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that the service says to the parts of one connection until it closes it."""
    answer = b""
    with socket.create_connection(("127.0.0.1", service.port), 60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        while data := connection.recv(1 << 16):
            answer += data
    return answer


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d+) ", answers)]


def request(line: str, *headers: str, body: bytes = b"", host: str = "Host: localhost") -> bytes:
    """Of the last request of a connection."""
    lines = (f"{line} HTTP/1.1", *filter(None, (host,)), *headers, "Connection: close", "", "")
    return "\r\n".join(lines).encode() + body


def posted(*headers: str, body: bytes = b"", kind: str = "text/plain") -> bytes:
    return request("POST /embed", f"Content-Type: {kind}", *headers, body=body)


def picture(file: bytes) -> bytes:
    return posted(f"Content-Length: {len(file)}", body=file, kind="image/png")


CHUNKED = "Transfer-Encoding: chunked"
EIGHT = "Content-Length: 8"
QUERY = posted(EIGHT, body=b"warranty")
CHUNKS = posted(CHUNKED, body=b"4\r\nwarr\r\n4;a=b\r\nanty\r\n0\r\na: b\r\n\r\n")
EXPECTING = posted(EIGHT, "Expect: 100-continue")


def test_vectors_are_those_of_python(service: load.Service, causal_bundle: Path) -> None:
    expected = Embedder.load(causal_bundle).embed_queries(["warranty"])[0]
    for answer in (
        talk(service, QUERY),
        talk(service, CHUNKS),
        talk(service, *(bytes([byte]) for byte in CHUNKS), pause=0.001),
        talk(service, request("POST /embed", "Content-Type: Text/Plain; charset=utf-8", EIGHT, body=b"warranty")),
    ):
        header, vectors = answer.split(b"\r\n\r\n", 1)
        assert f"Cembed-Rows: {len(expected)}\r\nCembed-Dim: {expected.shape[1]}\r\n".encode() in header
        assert np.abs(np.frombuffer(vectors, "<f4").reshape(expected.shape) - expected).max() < 1e-6


def test_a_page_may_come_in_chunks(service: load.Service, causal_bundle: Path) -> None:
    file = with_chunk(Image.open(GOLDEN / "causalqwen2_5" / "page.png"), b"tEXt", b"a\0" + bytes(3 << 20))
    halves = file[: 3 << 19], file[3 << 19 :]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in (*halves, b""))
    whole = talk(service, picture(file))
    assert talk(service, posted(CHUNKED, body=chunks, kind="image/png")) == whole
    vectors = np.frombuffer(whole.split(b"\r\n\r\n", 1)[1], "<f4")
    expected = Embedder.load(causal_bundle).embed_image(Image.open(GOLDEN / "causalqwen2_5" / "page.png"))
    assert np.abs(vectors - expected.flatten()).max() < 1e-6


@pytest.mark.parametrize(
    ("asked", "body"),
    [
        (request("GET /health"), b"ok\n"),
        (request("GET /health?a=b"), b"ok\n"),
        (request("HEAD /health"), b""),
        (request("GET /health", "Content-Length: 2", body=b"ab"), b"ok\n"),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", b"ok\n"),
        (request("GET /health", host="Host: LOCALHOST:1"), b"ok\n"),
        (request("GET /health", host="Host: 127.9.9.9:8080"), b"ok\n"),
        (request("GET /health", host="Host: [::1]:8080"), b"ok\n"),
        (request("GET /health", "Origin: http://localhost"), b"ok\n"),
        (request("GET /health", *["a: b"] * 90), b"ok\n"),
    ],
)
def test_health(service: load.Service, asked: bytes, body: bytes) -> None:
    answer = talk(service, asked)
    assert statuses(answer) == [200]
    assert b"Content-Length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\n" + body)


MEGABYTE = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
REFUSED: dict[str, tuple[bytes, int]] = {
    "another path": (request("GET /"), 404),
    "an absolute path": (request("GET http://localhost/health"), 404),
    "another method": (request("DELETE /embed"), 405),
    "HEAD of a POST": (request("HEAD /embed"), 405),
    "another type": (request("POST /embed", "Content-Type: image/gif", EIGHT, body=b"warranty"), 415),
    "no type": (request("POST /embed", EIGHT, body=b"warranty"), 415),
    "no picture": (picture(b"warranty"), 422),
    "no text": (posted(), 422),
    "another host": (request("GET /health", host="Host: pages.example"), 403),
    "a host like ours": (request("GET /health", host="Host: localhost.pages.example"), 403),
    "an address like ours": (request("GET /health", host="Host: 127.0.0.1.pages.example"), 403),
    "half an address": (request("GET /health", host="Host: [::1"), 403),
    "no host": (request("GET /health", host=""), 400),
    "an empty host": (request("GET /health", host="Host:"), 400),
    "two hosts": (request("GET /health", "Host: localhost"), 400),
    "a page of another site": (posted(EIGHT, "Origin: http://pages.example", body=b"warranty"), 403),
    "a page of another port": (posted(EIGHT, "Origin: http://localhost:1", body=b"warranty"), 403),
    "a page of nowhere": (posted(EIGHT, "Origin: null", body=b"warranty"), 403),
    "two lengths of the body": (posted(EIGHT, CHUNKED, body=b"0\r\n\r\n"), 400),
    "the same, turned": (posted(CHUNKED, EIGHT, body=b"0\r\n\r\n"), 400),
    "two Content-Lengths": (posted(EIGHT, "Content-Length: 9", body=b"warranty"), 400),
    "no number": (posted("Content-Length: eight"), 400),
    "a negative number": (posted("Content-Length: -1"), 400),
    "a signed number": (posted("Content-Length: +8", body=b"warranty"), 400),
    "another coding": (posted("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 400),
    "a second coding": (posted(CHUNKED, "Transfer-Encoding: gzip", body=b"0\r\n\r\n"), 400),
    "no chunk": (posted(CHUNKED, body=b"zz\r\n"), 400),
    "a wrong chunk": (posted(CHUNKED, body=b"1\r\nab\r\n0\r\n\r\n"), 400),
    "a chunk beyond 64 bits": (posted(CHUNKED, body=b"ffffffffffffffffff\r\n"), 400),
    "a long chunk header": (posted(CHUNKED, body=b"1;" + b"a" * 20000), 400),
    "a long trailer": (posted(CHUNKED, body=b"0\r\n" + b"a: b\r\n" * 4000), 400),
    "no header": (b"GET /health\r\n\r\n", 400),
    "no field": (request("GET /health", "field"), 400),
    "another version": (b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n", 400),
    "TLS": (attack.HELLO, 400),
    "a long text": (posted("Content-Length: 65537"), 413),
    "a long text in chunks": (posted(CHUNKED, body=b"10001\r\n"), 413),
    "a text of too many tokens": (posted("Content-Length: 65536", body=b"a " * 32768), 422),
    "a large length": (posted("Content-Length: 33554433", kind="image/png"), 413),
    "a large chunk": (posted(CHUNKED, body=b"2000001\r\n", kind="image/png"), 413),
    "large chunks": (posted(CHUNKED, body=MEGABYTE * 32 + b"1\r\n", kind="image/png"), 413),
    "another expectation": (posted(EIGHT, "Expect: tea"), 417),
    "a long field": (request("GET /health", "a: " + "b" * 9000), 431),
    "a long path": (request("GET /" + "a" * 9000), 431),
    "many fields": (request("GET /health", *["a: b"] * 120), 431),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_refused(service: load.Service, kind: str) -> None:
    asked, status = REFUSED[kind]
    answer = talk(service, asked)
    assert statuses(answer) == [status]
    assert b"/" not in answer.split(b"\r\n\r\n", 1)[1].replace(b"image/jpeg or image/png or text/plain", b"")
    assert statuses(talk(service, QUERY)) == [200]


def test_requests_in_a_row_are_answered_in_their_order(service: load.Service) -> None:
    on = QUERY.replace(b"Connection: close\r\n", b"")
    wrong = request("GET /wrong").replace(b"Connection: close\r\n", b"")
    assert statuses(talk(service, on + on + request("GET /health"))) == [200] * 3
    assert statuses(talk(service, on + wrong, request("GET /health"), pause=0.2)) == [200, 404, 200]


def test_a_client_that_waits_for_leave_to_send_gets_it(service: load.Service) -> None:
    assert statuses(talk(service, EXPECTING, b"warranty", pause=0.1)) == [100, 200]
    assert statuses(talk(service, EXPECTING.replace(b"/embed", b"/wrong"))) == [404]
    assert statuses(talk(service, EXPECTING + b"warranty")) == [200]


def test_slow_clients_are_sent_away(service: load.Service) -> None:
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(talk, service, b"GET /health HTTP/1.1\r\n")
        idle = pool.submit(talk, service)
    assert statuses(slow.result()) == [408]
    assert idle.result() == b""


def test_hosts_and_addresses_are_allowed_by_name(start: Start) -> None:
    named = start("--allow-host", "Pages.example")
    origin = "Origin: https://pages.example"
    assert statuses(talk(named, request("GET /health", origin, host="Host: pages.example"))) == [200]
    assert statuses(talk(named, request("GET /health", host="Host: www.pages.example"))) == [403]
    other = start("--host", "127.0.0.2")
    with socket.create_connection(("127.0.0.2", other.port)) as connection:
        connection.sendall(request("GET /health"))
        assert statuses(connection.recv(1 << 16)) == [200]
    with pytest.raises(ConnectionRefusedError):
        talk(other)


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "0"], ["a", "1", "2", "3", "4", "5"], ["a", "--host"], ["a", "--host", "b"], ["a", "--b", "c"]],
)
def test_wrong_arguments_are_told(samples: Path, arguments: list[str]) -> None:
    done = subprocess.run([samples / "cembed-service", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:29]) == (2, "usage: cembed-service BUNDLE ")


def large_page() -> bytes:
    """One that takes a while."""
    file = BytesIO()
    Image.new("L", (6000, 6000), 200).save(file, "PNG")
    return picture(file.getvalue())


def answers(service: load.Service) -> dict[int, int]:
    """How many the service has counted, by status."""
    metrics = talk(service, request("GET /metrics")).decode()
    return {int(a): int(b) for a, b in re.findall(r'answers_total\{status="(\d+)"\} (\d+)', metrics)}


def wait_for(service: load.Service, expected: dict[int, int]) -> None:
    deadline = time.monotonic() + 60
    while answers(service) != expected:
        assert time.monotonic() < deadline, answers(service)
        time.sleep(0.05)


def test_work_whose_client_left_is_not_done(start: Start) -> None:
    service = start(1, 8, 60)
    with ThreadPoolExecutor() as pool:
        busy = pool.submit(talk, service, large_page())
        time.sleep(0.1)
        for end in (socket.SHUT_WR, socket.SHUT_RDWR) * 4:
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(QUERY)
                connection.shutdown(end)
        assert statuses(busy.result()) == [200]
    wait_for(service, {200: 1, 499: 8})


def test_who_waited_too_long_is_refused(start: Start) -> None:
    service = start(1, 15, 1)
    page = large_page()
    with ThreadPoolExecutor(24) as pool:
        counts = Counter(statuses(answer)[0] for answer in pool.map(lambda _: talk(service, page), range(24)))
    assert counts.keys() == {200, 429, 503}
    assert counts.total() == 24
    wait_for(service, dict(counts))


def test_a_request_that_was_begun_is_answered_after_sigterm(start: Start) -> None:
    service = start()
    with socket.create_connection(("127.0.0.1", service.port)) as begun:
        begun.sendall(QUERY[:-4])
        assert statuses(talk(service, request("GET /health"))) == [200]
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert statuses(talk(service, request("GET /health"))) == [503]
        begun.sendall(QUERY[-4:])
        assert statuses(begun.recv(1 << 16)) == [200]
    assert service.process.wait(60) == 0


def test_the_service_under_load(samples: Path, causal_bundle: Path, start: Start) -> None:
    """A second each: ten times what it can do is refused, it recovers, slow connections cost nobody, SIGTERM drains."""
    if not shutil.which("wrk"):
        pytest.skip("the service is not put under load: no wrk")
    service = start(load.CALLERS, load.QUEUE, load.PATIENCE)
    again = [samples / "cembed-service", causal_bundle, str(service.port)]
    assert (
        subprocess.run(again, capture_output=True, text=True).stderr
        == f"cembed-service: port {service.port} is taken\n"
    )
    loads = dict(load.measure(service, 1))
    assert loads["overload"].statuses.keys() == {"200", "429"}
    assert loads["after it"].rate > 0  # what still waits of the overload may cost it a refusal
    assert loads["alone"].statuses.keys() == loads["slow ones"].statuses.keys() == {"200"}
    assert service.drain()[0] == {200: load.CALLERS + load.QUEUE}


def test_the_service_under_attack(start: Start) -> None:
    """A second each, of 150 bad clients of a kind: little memory, /health at once, queries are answered afterwards."""
    page = (GOLDEN / "causalqwen2_5" / "page.png").read_bytes()
    damages = dict(attack.attack_all(start(), page, 150, 1))
    assert len(damages) == len(attack.KINDS)
    assert {kind: str(damage) for kind, damage in damages.items() if not damage.is_small} == {}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(image: Image.Image, kind: bytes, data: bytes) -> bytes:
    """A PNG with one chunk more, after its size."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()[:33] + chunk(kind, data) + file.getvalue()[33:]


def write_pictures(folder: Path) -> None:
    """Of every kind that libpng and TurboJPEG read."""
    page = Image.open(GOLDEN / "causalqwen2_5" / "page.png").convert("RGB")
    alpha = Image.linear_gradient("L").resize(page.size)
    kinds = {mode: page.convert(mode) for mode in ("RGB", "L", "LA", "P", "1")}
    kinds["RGBA"] = Image.merge("RGBA", (*page.split(), alpha))
    kinds["I;16"] = Image.fromarray(np.asarray(page.convert("L")).astype(np.uint16) * 251)
    for name, image in kinds.items():
        image.save(folder / f"{name}.png")
    (folder / "gamma.png").write_bytes(with_chunk(page, b"gAMA", struct.pack(">I", 100000)))
    page.convert("L").save(folder / "grey.jpg")
    page.save(folder / "progressive.jpg", progressive=True, subsampling=0)
    Image.merge("CMYK", (*page.split(), alpha)).save(folder / "inks.jpg")
    exif = Image.Exif()
    for exif[ExifTags.Base.Orientation] in range(1, 10):
        for suffix in ("jpg", "png"):
            page.save(folder / f"orientation{exif[ExifTags.Base.Orientation]}.{suffix}", exif=exif)


def test_pictures_are_seen_as_python_does(
    samples: Path, causal_bundle: Path, onnxruntime_library: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path)
    paths = sorted(tmp_path.iterdir())
    program, variables = samples / "cembed-embed", {"CEMBED_ONNXRUNTIME": str(onnxruntime_library)}
    lines = [line.split(" ") for line in libcembed.run(program, causal_bundle, *paths, **variables).splitlines()]
    embedder = Embedder.load(causal_bundle)
    for path in paths:
        vectors = np.array([line[2:] for line in lines if line[0] == str(path)], np.float32)
        assert np.abs(vectors - embedder.embed_image(Image.open(path))).max() < 1e-6, path.name


def test_metadata_that_is_not_used_loses_no_page(service: load.Service) -> None:
    page = Image.open(GOLDEN / "causalqwen2_5" / "page.png").convert("RGB")
    plain = with_chunk(page, b"tEXt", b"a\0b")
    damaged, long = plain.replace(b"a\0b", b"a\0c"), with_chunk(page, b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    first, *others = (talk(service, picture(file)) for file in (plain, damaged, long))
    assert statuses(first) == [200]
    assert others == [first, first]


def test_pictures_that_cannot_be_read_are_told(service: load.Service) -> None:
    giant = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    jpeg = BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    faults = {
        b"GIF89a": b"no PNG or JPEG\n",
        b"\x89PNG\r\n\x1a\n" + giant: b"more than 100 megapixels\n",
        b"\x89PNG\r\n\x1a\n" + giant[:-20]: b"a damaged PNG or JPEG\n",
        b"\x89PNG\r\n\x1a\n": b"a damaged PNG or JPEG\n",
        b"\xff\xd8\xff": b"a damaged PNG or JPEG\n",
        jpeg.getvalue()[:200]: b"a damaged PNG or JPEG\n",
        b"\xff\xd8\xff\xe1\x00\x07Exif\0": b"a damaged PNG or JPEG\n",
        jpeg.getvalue().replace(b"\xff\xc0\x00\x11\x08\0\x40\0\x40", b"\xff\xc0\x00\x11\x08\xff\0\xff\0"): (
            b"more than 100 megapixels\n"
        ),
    }
    for file, fault in faults.items():
        assert talk(service, picture(file)).endswith(b"\r\n\r\n" + fault), file[:20]
