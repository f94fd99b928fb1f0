"""The worker processes as the server sees them, and the one line in which requests wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import anyio

from cembed.runtime.embed.loading import Loading
from cembed.runtime.errors import CembedError
from cembed.serve.errors import RefusalError
from cembed.serve.frames import PREFIX, Array, Header, NonsenseError, pack, sizes, unpack
from cembed.serve.settings import Limits

IN_FLIGHT, PAGES_IN_FLIGHT = 32, 3
"""Jobs that a worker has at a time, so that it never waits for the next one. Those with pages are longer, and dropped
if their client leaves before they are handed over: one is computed, one decoded, one is next to be."""
STREAM = 1 << 22
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from cembed.serve.boot import main; main()"
START_SECONDS = 600.0
RESTART_SECONDS, LONGEST_PAUSE = 1.0, 10.0
"""Between two attempts to start workers, at first and at most."""
STILL_SECONDS = 0.01
"""How often it is asked whether all that was begun is answered."""
MOST_LOSSES = 3
"""Of workers, before a job is given up: one that may be the reason counts twice."""
log = logging.getLogger("cembed.serve")

Reply = tuple[Header, Mapping[str, Array]]


class LostError(Exception):
    """The worker ended; `begun` says whether this job may have been why."""

    def __init__(self, begun: bool) -> None:
        super().__init__(begun)
        self.begun = begun


class Worker:
    """One process; answers come in the order of the jobs."""

    def __init__(self, settings: Loading) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._pending: deque[asyncio.Future[Reply]] = deque()
        self._reader: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        return len(self._pending)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None and self._reader is not None

    async def start(self) -> float:
        """Gives the lowest cosine of the self-test. Raises CembedError: what keeps the worker from starting."""
        settings = json.dumps(asdict(self._settings))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BOOT, settings, *map(str, sys.path), stdin=PIPE, stdout=PIPE, limit=STREAM
        )
        try:
            with anyio.fail_after(START_SECONDS):
                header, _ = await self._receive()
        except (asyncio.IncompleteReadError, NonsenseError, TimeoutError):
            await self.end()
            most = self._settings.max_memory
            limited = "" if most is None else f": --max-memory {most >> 20} may be too little for it"
            raise CembedError(f"a worker did not start{limited}") from None
        if "error" in header:
            await self.end()
            raise CembedError(header["error"])
        self._reader = asyncio.create_task(self._listen())
        return float(header["cosine"])

    async def _receive(self) -> Reply:
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        header, arrays = sizes(await stream.readexactly(PREFIX))
        return unpack(await stream.readexactly(header), await stream.readexactly(arrays))

    async def _listen(self) -> None:
        try:
            while True:
                reply = await self._receive()
                answered = self._pending.popleft()
                if not answered.done():
                    answered.set_result(reply)
        except (asyncio.IncompleteReadError, NonsenseError, IndexError, OSError):
            self._reader = None
            self._lose()

    def _lose(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        begun = True
        while self._pending:
            lost = self._pending.popleft()
            if not lost.done():
                lost.set_exception(LostError(begun))
                lost.exception()  # nobody may be waiting any more
            begun = False

    def submit(self, job: Mapping[str, Any]) -> asyncio.Future[Reply]:
        """Hands a job over. Its future raises LostError."""
        assert self._process is not None
        assert self._process.stdin is not None
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending.append(reply)
        try:
            self._process.stdin.write(pack(job))
        except (OSError, RuntimeError):  # uvloop's, of a pipe that was closed since
            if self._reader is not None:
                self._reader.cancel()
            self._reader = None
            self._lose()
        return reply

    async def end(self) -> None:
        """Ends the process, and whatever it is doing."""
        process, reader = self._process, self._reader
        self._process = self._reader = None
        if reader is not None:
            reader.cancel()
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process is not None:
            await process.wait()
        self._lose()


async def start_all(workers: Sequence[Worker]) -> float:
    """Gives the lowest cosine of their self-tests. Raises CembedError: what keeps one from starting; none is left."""
    try:
        return min(await asyncio.gather(*(worker.start() for worker in workers)))
    except BaseException:
        await asyncio.gather(*(worker.end() for worker in workers))
        raise


class Pool:
    """`workers` processes, and the requests that wait for them in the order of their coming."""

    def __init__(self, settings: Loading, workers: int, limits: Limits) -> None:
        self._limits, self.requests, self.cosine = limits, 0, 1.0
        self.capacity = workers * IN_FLIGHT
        self._workers = [Worker(settings) for _ in range(workers)]
        self._free, self._pages = (asyncio.Semaphore(workers * each) for each in (IN_FLIGHT, PAGES_IN_FLIGHT))
        self._restarting: dict[Worker, asyncio.Task[None]] = {}
        self._tried = asyncio.Event()  # of this attempt to start one
        self._inside, self._open = 0, asyncio.Event()
        self._open.set()
        self._seconds = 0.1  # of a request, smoothed
        self.ready = False

    async def start(self) -> None:
        """Raises CembedError: what keeps a worker from starting."""
        self.cosine = await start_all(self._workers)
        self.ready = True

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """While entered, nothing is under way: what was begun is answered before, what comes waits until after."""
        self._open.clear()
        try:
            while self._inside:
                await asyncio.sleep(STILL_SECONDS)
            yield
        finally:
            self._open.set()

    async def close(self) -> None:
        self.ready = False
        for restarting in self._restarting.values():
            restarting.cancel()
        await asyncio.gather(*(worker.end() for worker in self._workers))

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return max(0, self.requests - self.capacity)

    @property
    def full(self) -> bool:
        return self.requests >= self.capacity + self._limits.queue

    def busy(self) -> RefusalError:
        seconds = max(1, round(self._seconds * self.requests / len(self._workers)))
        return RefusalError(429, "too many requests are waiting: try again later", code="busy", retry_after=seconds)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A request's place among those that may wait, for all of its jobs. Raises RefusalError: there is none."""
        if not self.ready:
            raise RefusalError(503, "the server is starting or stopping: try again later", retry_after=5)
        if self.full:
            raise self.busy()
        self.requests += 1
        try:
            await self._open.wait()
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
        finally:
            self.requests -= 1

    async def run(self, job: Mapping[str, Any]) -> Reply:
        """A job's reply, once it is its turn; one whose caller gives up before that is never begun.

        Raises RefusalError: it waited or took too long, its worker ended, or what is wrong with the page or query.
        """
        losses = 0
        while True:
            await self._turn("path" in job)
            start = time.monotonic()
            try:
                reply = await self._answer(job)
            except LostError as lost:
                losses += 2 if lost.begun else 1
                if losses > MOST_LOSSES:
                    raise RefusalError(503, "the worker ended while it was at this; try again", retry_after=1) from None
                continue
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            return checked(reply)

    async def _turn(self, page: bool) -> None:
        try:
            with anyio.fail_after(self._limits.wait):
                if page:
                    await self._pages.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    self._give_back(page, free=False)
                    raise
        except TimeoutError:
            raise RefusalError(503, f"waited {self._limits.wait:g} s for a worker", retry_after=5) from None

    def _give_back(self, page: bool, free: bool = True) -> None:
        if page:
            self._pages.release()
        if free:
            self._free.release()

    async def _answer(self, job: Mapping[str, Any]) -> Reply:
        """Has a turn; gives it back when the worker has answered, whether or not somebody still waits for it."""
        page = "path" in job
        try:
            worker = await self._idlest()
            reply = worker.submit(job)
        except BaseException:
            self._give_back(page)
            raise
        reply.add_done_callback(lambda _: self._give_back(page))
        try:
            with anyio.fail_after(self._limits.answer):
                return await asyncio.shield(reply)
        except TimeoutError:
            await worker.end()
            raise RefusalError(504, f"took longer than {self._limits.answer:g} s") from None

    async def _idlest(self) -> Worker:
        """The living worker with the least to do; one that ended is started again meanwhile."""
        for worker in self._workers:
            if not worker.alive and worker not in self._restarting:
                self._restarting[worker] = asyncio.ensure_future(self._restart(worker))
        while not (living := [worker for worker in self._workers if worker.alive]):
            if not self.ready:
                raise RefusalError(503, "no worker can be started; the server's log says why", retry_after=30)
            await self._tried.wait()
        return min(living, key=lambda worker: worker.load)

    async def _restart(self, worker: Worker) -> None:
        """Starts one that ended, again and again: what keeps it from it may pass."""
        pause = RESTART_SECONDS
        try:
            while not worker.alive:
                await worker.end()
                await self._start_again(worker)
                if not worker.alive:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            del self._restarting[worker]

    async def _start_again(self, worker: Worker) -> None:
        try:
            await worker.start()
        except Exception as error:  # whatever it is, it is tried again
            log.error("a worker cannot be started: %s", error)
        self.ready = any(worker.alive for worker in self._workers)
        self._tried.set()
        self._tried = asyncio.Event()


def checked(reply: Reply) -> Reply:
    """Raises RefusalError for what the worker says is wrong."""
    header, _ = reply
    if "fault" in header:
        raise RefusalError(500, header["fault"])
    if "error" in header:
        raise RefusalError(422, header["error"])
    return reply
