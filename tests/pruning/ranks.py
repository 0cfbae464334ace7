"""Two processes that stay, so that a test of several ranks costs milliseconds and not an import."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

#: How long a test waits for the ranks, whose start imports torch, and a rank for the others.
SECONDS = 240
COLLECTIVE_SECONDS = 60


def _serve(rank: int, size: int, meeting_point: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Ranks:
    """Runs functions on every rank of a gloo group.

    Args:
        size: number of processes.
        folder: where they meet.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        meeting_point = (folder / "meeting_point").as_uri()
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, meeting_point, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of the ranks; AssertionError if one raises or none comes in time."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.close()
                two_ranks.cache_clear()
                raise AssertionError(f"rank {rank} did not answer within {SECONDS} s")
            result, error = pipe.recv()
            results.append(result)
            errors += [f"rank {rank}: {error}"] if error else []
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()


@functools.lru_cache(maxsize=1)
def two_ranks() -> Ranks:
    """The same two processes for all test files; they end with the process that started them."""
    return Ranks(2, Path(tempfile.mkdtemp(prefix="sapwood-ranks-")))
