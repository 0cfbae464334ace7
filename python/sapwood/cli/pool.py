"""Does the jobs of a comparison: one after the other, or several at once in processes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sapwood.cli import runs, tasks
from sapwood.cli.interrupt import Interrupts
from sapwood.cli.runs import Job
from sapwood.data import Dataset
from sapwood.pruning import Progress

_TELL_EVERY = 0.2  # seconds between two messages of a worker

Source = tuple[str, Path | None, int | None]  # the arguments of ``tasks.read``


class JobError(RuntimeError):
    """A job ended in an error; the message says which job and what error."""


def _silent(text: str) -> None:
    """Says nothing."""


@dataclass
class Listener:
    """What the caller wants to know."""

    steps: Callable[[int], None]  # so many further optimizer steps are done
    done: Callable[[Job], None]
    say: Callable[[str], None] = _silent  # a line for people


def one_by_one(
    jobs: Sequence[Job], dataset: Dataset, folder: Path, listener: Listener, interrupts: Interrupts
) -> None:
    """Does all jobs in this process, in their order.

    Raises:
        KeyboardInterrupt: after the checkpoint of the running job is written.
        JobError: when a job fails.
    """

    def observe(now: Progress) -> None:
        listener.steps(1)
        interrupts.check()

    for job in jobs:
        interrupts.check()
        try:
            runs.run(job, dataset, folder, [observe])
        except ValueError as error:
            raise JobError(f"{job.title}: {error}") from error
        listener.done(job)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None


@dataclass
class _Pool:
    """Processes of one thread each; a job is given to the next that is free."""

    waiting: list[Job]
    listener: Listener
    finished: set[str]
    workers: list[_Worker] = field(default_factory=list)
    stopping: bool = False

    def start(self, count: int, source: Source, folder: Path) -> None:
        """Starts the processes. They ignore Ctrl-C: it is this process that tells them."""
        context = multiprocessing.get_context("spawn")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, source, folder), daemon=True)
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours))
        finally:
            signal.signal(signal.SIGINT, before)

    def hand_out(self) -> None:
        """Gives every free worker the longest job whose needs are there."""
        for worker in self.workers:
            ready = [job for job in self.waiting if self.finished.issuperset(job.needs)]
            if worker.job is None and ready:
                worker.job = max(ready, key=lambda job: job.epochs)
                self.waiting.remove(worker.job)
                worker.connection.send(worker.job)

    def stop(self) -> None:
        """Asks every worker to write its checkpoint and end."""
        self.stopping = True
        for worker in self.workers:
            with suppress(OSError):  # it has just died, as ``listen`` will find
                worker.connection.send(None)

    def listen(self) -> None:
        """Takes the messages that are there; waits for one if there are none."""
        ready = wait([worker.connection for worker in self.workers], timeout=_TELL_EVERY)
        for worker in [w for w in self.workers if w.connection in ready]:
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                self._lost(worker)
                continue
            self._take(worker, kind, value)

    def _take(self, worker: _Worker, kind: str, value: Any) -> None:
        job = worker.job
        assert job is not None
        if kind == "steps":
            self.listener.steps(value)
            return
        if kind == "failed":
            raise JobError(f"{job.title}: {value}")
        worker.job = None
        self.finished.update(job.names)
        self.listener.done(job)

    def _lost(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.join()
        if not self.stopping:
            doing = "" if worker.job is None else f" in {worker.job.title}"
            code = worker.process.exitcode
            raise JobError(f"a worker died{doing} with exit code {code}: out of memory?")

    def end(self) -> None:
        """Ends what still runs."""
        for worker in self.workers:
            worker.connection.close()  # the end of the pipe ends an idle worker
            worker.process.join(timeout=0 if worker.job else 5)
            worker.process.kill()
            worker.process.join()


def several_at_once(
    jobs: Sequence[Job],
    source: Source,
    folder: Path,
    workers: int,
    finished: set[str],
    listener: Listener,
    interrupts: Interrupts,
) -> None:
    """Does all jobs in processes of one thread each.

    Args:
        jobs: in any order.
        source: the data, read by every process.
        folder: where results are kept.
        workers: processes.
        finished: names of results that are there already.
        listener: is told what happens.
        interrupts: asked several times per second.

    Raises:
        KeyboardInterrupt: after the checkpoints of all running jobs are written.
        JobError: when a job fails or a process dies.
    """
    pool = _Pool(list(jobs), listener, set(finished))
    try:
        pool.start(min(workers, len(jobs)), source, folder)
        while pool.workers and (pool.stopping or pool.waiting or _busy(pool)):
            if interrupts.asked() and not pool.stopping:
                pool.stop()
            if not pool.stopping:
                pool.hand_out()
            pool.listen()
    finally:
        pool.end()
    interrupts.check()


def _busy(pool: _Pool) -> bool:
    return any(worker.job is not None for worker in pool.workers)


def _serve(connection: Connection, source: Source, folder: Path) -> None:
    """What a process does: one job after the other, until the pipe closes."""
    dataset = tasks.read(*source)
    tell = _Teller(connection)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        if job is None:
            return
        try:
            runs.run(job, dataset, folder, [tell])
        except KeyboardInterrupt:
            return
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))
        else:
            tell.flush()
            connection.send(("done", None))


class _Teller:
    """Counts steps and tells them now and then; stops when there is something to read.

    While a job runs that can only be the wish to stop, or the end of the pipe because the other
    process is gone.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._steps = 0
        self._told = time.monotonic()

    def __call__(self, now: Progress) -> None:
        if self._connection.poll():
            raise KeyboardInterrupt
        self._steps += 1
        if time.monotonic() - self._told > _TELL_EVERY:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("steps", self._steps))
        self._steps, self._told = 0, time.monotonic()
