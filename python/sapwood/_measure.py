"""Timing that survives a shared machine: interleaved rounds, and the name of the machine."""

from __future__ import annotations

import ctypes
import platform
import random
import time
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

#: A sample lasts at least this long, in seconds: shorter calls are repeated inside one sample.
SHORTEST_SAMPLE = 1e-4

#: For so many seconds a call runs before it is timed: after neighbours have used the last-level
#: cache it takes several passes over a weight until it lies there again.
SETTLE = 3e-3

#: Written between samples on a GPU, so that no provider finds its weights in the last-level cache.
_GPU_FLUSH_BYTES = 256 << 20


#: Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@lru_cache(maxsize=1)
def hold_memory() -> bool:
    """Keeps freed memory in the process, so that no timed call is charged for page faults.

    Otherwise the C library returns the memory of a large result to the system or keeps it, by what
    else lives at that moment: the same convolution takes 6.5 or 9.7 ms, and a ratio compares two
    states of the heap. For the rest of the process; False where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    taken = [mallopt(option, value) == 1 for option, value in settings.items()]
    return all(taken)


class Sampler:
    """Times one call in its steady state.

    On the CPU calls that are not timed precede every sample: otherwise the weights that
    neighbours pushed out of the cache would count, and a ratio would depend on how many providers
    take part. Short calls are repeated within a sample, so the clock's grain vanishes.
    """

    def __init__(self, call: Call, device: str = "cpu", *, settle: float | None = None) -> None:
        self._call = call
        self._settle = SETTLE if settle is None else settle
        self._flush: torch.Tensor | None = None
        if device == "cuda":
            self._flush = torch.empty(_GPU_FLUSH_BYTES, dtype=torch.uint8, device=device)
        call()
        self._repeats = 1
        #: The sample that settled how often the call is repeated.
        self.first = self.sample()
        while device == "cpu" and self.first * self._repeats < SHORTEST_SAMPLE:
            self._repeats *= 2
            self.first = self.sample()

    def sample(self) -> float:
        """Seconds per call, averaged over one sample."""
        if self._flush is not None:
            return self._gpu_sample(self._flush)
        call = self._call
        settled = time.perf_counter() + self._settle
        while time.perf_counter() < settled:
            call()
        start = time.perf_counter()
        for _ in range(self._repeats):
            call()
        return (time.perf_counter() - start) / self._repeats

    def _gpu_sample(self, flush: torch.Tensor) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        self._call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def interleave(
    calls: Mapping[Name, Call],
    *,
    rounds: int = 15,
    seconds: float = 0.5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[Name, list[float]]:
    """Times several calls in rounds; in each round every call runs once, in random order.

    A ratio within a round compares two times taken under the same load, so it stays meaningful
    where absolute times drift.

    >>> times = interleave({"a": lambda: sum(range(9)), "b": lambda: None}, rounds=3, seconds=0)
    >>> len(times["a"]), len(times["b"])
    (3, 3)

    Args:
        calls: what to time, by name; each is warmed up first.
        rounds: smallest number of rounds.
        seconds: smallest total duration; more rounds follow until it is reached.
        device: ``"cpu"`` or ``"cuda"`` (timed by events, after a cache flush).
        seed: of the order within the rounds.

    Returns:
        Seconds per call, one entry per round, by name; entry i of all names is of the same round.
    """
    samplers = {name: Sampler(call, device) for name, call in calls.items()}
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < seconds:
        shuffle(order)
        for name in order:
            times[name].append(samplers[name].sample())
        done += 1
    return times


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The CPU's model, with family and model number where the name alone is ambiguous."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            fields.setdefault(field.strip(), value.strip())
    except OSError:
        pass
    if "model name" in fields:
        family, model = fields.get("cpu family", "?"), fields.get("model", "?")
        return f"{fields['model name']} (family {family} model {model})"
    if "CPU part" in fields:
        return f"{platform.machine()} {fields.get('CPU implementer', '?')} {fields['CPU part']}"
    return platform.processor() or platform.machine() or "unknown CPU"


def machine_name(device: str = "cpu") -> str:
    """CPU model and thread count, or the GPU's name; never a host name."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
