"""The worker processes as the server sees them: a queue in front, a limit of time a film, another for a lost one."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cxr_fastai.errors import ModelFileError
from cxr_fastai.predict import Prediction
from cxr_fastai.serving.config import BODIES_IN_MEMORY, ServeConfig
from cxr_fastai.serving.worker import ANSWER, HEAD

START_SECONDS = 60.0  # until a worker has loaded the model
CHUNK = 256 * 1024  # bytes written to a pipe at a time, so that a film is not copied whole into a buffer
MAX_PAUSE = 30.0  # seconds between tries to start a worker
FIRST_GUESS = 0.1  # seconds a film takes, until films have been measured


class Busy(Exception):
    """No place is free now, or (status 503) no worker; `seconds` tells when to come again."""

    def __init__(self, reason: str, seconds: int, status: int = 429):
        super().__init__(reason)
        self.seconds, self.status = seconds, status


class WorkerLost(Exception):
    """A worker that died or went silent; what it was reading is why, or so one must think."""


@dataclass
class Job:
    """One film that waits for a worker, and the answer that somebody waits for."""

    name: str
    data: bytes | bytearray
    pictures: bool
    answer: asyncio.Future[dict[str, Any]]


class Worker:
    """One process that reads films, one at a time."""

    def __init__(self, process: asyncio.subprocess.Process, card: dict[str, Any]):
        self.process, self.card = process, card

    @classmethod
    async def start(cls, model: str, config: ServeConfig) -> "Worker":
        """Start a process and wait until it has loaded the model.

        Raises
        ------
        ModelFileError
            Where it cannot: with the worker's own reason, or that it died or took too long.
        """
        threads, limits = config.threads, asdict(config.limits)
        settings = {"model": model, "threads": threads, "megabytes": config.worker_mb, "limits": limits}
        code = f"import sys; sys.path[:] = {sys.path!r}; from cxr_fastai.serving.worker import main; main()"
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {key: value for key, value in os.environ.items() if key != "CXR_TOKEN"}
        environment |= dict.fromkeys(names, str(threads))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-B", "-c", code, json.dumps(settings)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
        )
        worker = cls(process, {})
        try:
            async with asyncio.timeout(START_SECONDS):
                first = await worker._receive()
        except (WorkerLost, TimeoutError):
            await worker.stop()
            raise ModelFileError(f"{model}: a process that loads it ended or hung; is --worker-mb too low?") from None
        except BaseException:
            await worker.stop()
            raise
        if "card" not in first:
            await worker.stop()
            raise ModelFileError(first.get("failed", f"{model}: cannot be loaded"))
        worker.card = first["card"]
        return worker

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.returncode is None

    async def ask(self, job: Job) -> dict[str, Any]:
        """Return row and picture of one film.

        Raises
        ------
        WorkerLost
            Where the process ends meanwhile.
        """
        head = json.dumps({"name": job.name, "pictures": job.pictures}).encode()
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(HEAD.pack(len(head), len(job.data)) + head)
            for start in range(0, len(job.data), CHUNK):
                pipe.write(job.data[start : start + CHUNK])
                await pipe.drain()
        except OSError as error:
            raise WorkerLost from error
        return await self._receive()

    async def _receive(self) -> dict[str, Any]:
        pipe = self.process.stdout
        assert pipe is not None
        try:
            (length,) = ANSWER.unpack(await pipe.readexactly(ANSWER.size))
            return json.loads(await pipe.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, ValueError) as error:
            raise WorkerLost from error

    async def stop(self) -> None:
        """End the process now."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        pipe = self.process.stdin
        if pipe is not None and not pipe.transport.is_closing():  # what is unsent would keep it open
            pipe.transport.abort()
        await self.process.wait()


class Pool:
    """All workers, and the films that wait for one.

    Attributes
    ----------
    card : dict
        What the model says of itself; workers started later must say the same.
    waiting : int
        Films that have a place: waiting, or being read.
    held : int
        Bytes of bodies in memory.
    """

    def __init__(self, model: str, config: ServeConfig):
        self.model, self.config = model, config
        self.card: dict[str, Any] = {}
        self.waiting = self.held = self.alive = 0
        self.failing = False
        self.seconds = FIRST_GUESS
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every worker; ModelFileError where the model cannot be loaded."""
        tasks = [asyncio.create_task(Worker.start(self.model, self.config)) for _ in range(self.config.processes)]
        started = await asyncio.gather(*tasks, return_exceptions=True)
        workers = [worker for worker in started if isinstance(worker, Worker)]
        if faults := [fault for fault in started if isinstance(fault, BaseException)]:
            for worker in workers:
                await worker.stop()
            raise faults[0]
        self.card = workers[0].card
        self._keepers = [asyncio.create_task(self._keep(worker)) for worker in workers]
        self.alive = len(workers)

    async def close(self) -> None:
        """End every worker."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def retry_after(self) -> int:
        """Return in how many whole seconds the films that wait now should be done."""
        return min(60, max(1, math.ceil(self.waiting * self.seconds / self.config.processes)))

    def require_places(self, n: int) -> None:
        """Raise Busy unless `n` more films may wait."""
        if self.alive == 0 and self.failing:
            raise Busy("the model cannot be loaded any more; whoever runs this server must look", 30, 503)
        if self.waiting + n > self.config.queue:
            raise Busy(f"{self.waiting} films wait or are read, of {self.config.queue} places", self.retry_after())

    @contextlib.contextmanager
    def places(self, n: int) -> Iterator[None]:
        """Keep places for `n` films, or raise Busy."""
        self.require_places(n)
        self.waiting += n
        try:
            yield
        finally:
            self.waiting -= n

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Give a function that counts bytes kept for one request, and raises Busy where all requests keep too many."""
        mine = 0

        def hold(n: int) -> None:
            nonlocal mine
            if self.held + n > BODIES_IN_MEMORY * self.config.max_bytes:
                raise Busy("the films of other clients fill the memory", self.retry_after())
            self.held, mine = self.held + n, mine + n

        try:
            yield hold
        finally:
            self.held -= mine

    async def classify(self, name: str, data: bytes | bytearray, pictures: bool) -> dict[str, Any]:
        """Return {"row", "picture"} of one film; a film that costs a worker its life gets a row with `error`."""
        job = Job(name, data, pictures, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return await job.answer

    async def _keep(self, worker: Worker) -> None:
        """Give one worker films for ever, and start it again where it is lost."""
        try:
            while True:
                job = await self._jobs.get()
                if job.answer.cancelled():  # the client has gone, or waited too long
                    continue
                if not worker.alive:  # it died while it had nothing to do, so no film is to blame
                    worker = await self._replace(worker)
                answer, lost = await self._ask(worker, job)
                if not job.answer.cancelled():
                    job.answer.set_result(answer)
                if lost:
                    worker = await self._replace(worker)
        finally:
            await worker.stop()

    async def _ask(self, worker: Worker, job: Job) -> tuple[dict[str, Any], bool]:
        """Return the answer about one film, and whether the worker was lost over it."""
        clock, limit = asyncio.get_running_loop().time, self.config.predict_seconds
        began = clock()
        try:
            async with asyncio.timeout(limit):
                answer = await worker.ask(job)
            self.seconds += 0.05 * (clock() - began - self.seconds)
            return answer, False
        except TimeoutError:
            error = f"reading it takes longer than {limit:g} seconds; export it uncompressed, or smaller"
        except WorkerLost:
            error = "the process that read it died of it; export it again, or in another format"
        row = Prediction(job.name, error=error, seconds=round(clock() - began, 4))
        return {"row": row.to_dict(), "picture": None}, True

    async def _replace(self, worker: Worker) -> Worker:
        """Return a new worker in the place of a lost one, however long that takes."""
        await worker.stop()
        self.alive -= 1
        for tries in itertools.count():
            with contextlib.suppress(ModelFileError, OSError):
                new = await Worker.start(self.model, self.config)
                if new.card == self.card:
                    break
                await new.stop()  # the file was exchanged: two models behind one address would be worse than none
            self.failing = True
            await asyncio.sleep(min(MAX_PAUSE, 0.5 * 2**tries))
        self.alive, self.failing = self.alive + 1, False
        return new
