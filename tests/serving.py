"""A server as its own process, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cembed.runtime import Embedder

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "samples" / "bundle"
PAGES = ROOT / "samples" / "pages" / "sample" / "pages"
BOOT = """
import sys, json
from pathlib import Path
from cembed.serve.app import serve
from cembed.runtime.embed.loading import Loading
from cembed.serve.settings import Limits, Settings
given = json.loads(sys.argv[1])
paths = {name: Path(given.pop(name)) for name in ("index",) if given.get(name)}
worker = Loading(given.pop("bundle"), **given.pop("worker", {}))
limits = Limits(**given.pop("limits", {}))
serve(Settings(worker, port=0, limits=limits, **paths, **given))
"""
START_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of a refusal, in whatever shape."""
        found = self.json
        error = found.get("error", found)
        text: str = error.get("message", "") if isinstance(error, dict) else error
        assert "\n" not in text
        assert "Traceback" not in text
        return text


class Server:
    """`cembed serve` with settings that the command line may not have; `log` is what it has written."""

    def __init__(self, log: Path, bundle: Path = SAMPLE, **settings: Any) -> None:
        self.log = log
        paths = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        command = [sys.executable, "-c", BOOT, json.dumps({"bundle": str(bundle), **paths})]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stderr=file, cwd=ROOT)
        self.port = self._wait()

    def _wait(self) -> int:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            text = self.log.read_text()
            if '"ready": true' in text:
                return int(text.partition(" at http://")[2].split()[0].rpartition(":")[2])
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(40)
            finally:
                self.process.kill()
                self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """`body` is bytes, text (text/plain), or what JSON holds."""
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        data = body.encode() if isinstance(body, str) else body
        if data is not None and not isinstance(data, bytes):
            data = json.dumps(data).encode()
        given = {"Content-Type": "text/plain" if isinstance(body, str) else kind} if body is not None else {}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, {**given, **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)


def sample_pages(count: int) -> list[Path]:
    return sorted(PAGES.iterdir())[:count]


def load_sample() -> Embedder:
    """As the server's workers do."""
    return Embedder.load(SAMPLE)
