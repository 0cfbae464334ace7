"""Which kernel runs, and why the others cannot.

Each op lists its backends in order of preference; a backend answers a reason when it cannot run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sapwood import _check

_F = TypeVar("_F", bound=Callable[..., Any])
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
NAMES = ("auto", "native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. ``why_not`` may read only devices, dtypes, shapes and flags."""

    name: str
    why_not: Callable[..., str | None]  # same arguments as ``run``
    run: Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """One line of an explanation: a backend, and why it does not run (None: it does)."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """What would run for one call, and the reasons against everything else."""

    op: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str:
        return next((c.name for c in self.candidates if c.reason is None), "none")

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.candidates)
        lines = [f"  {c.name:<{width}}  {c.reason or 'will run'}" for c in self.candidates]
        return "\n".join([f"sapwood.{self.op}:", *lines])


explainers: dict[str, Callable[..., Explanation]] = {}


def explainable(explainer: Callable[..., Explanation]) -> Callable[[_F], _F]:
    """Decorates a public op with the function that explains a call of it."""

    def decorate(function: _F) -> _F:
        explainers[function.__name__] = explainer
        return function

    return decorate


def _forced_by_environment() -> str:
    forced = os.environ.get("SAPWOOD_BACKEND", "auto")
    _check.one_of("backend", "SAPWOOD_BACKEND", forced, NAMES)
    return forced


_forced = _forced_by_environment()
_log = os.environ.get("SAPWOOD_LOG", "0") == "1"
_logged: set[str] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend inside the block; an op that cannot use it raises with the reason.

    Example::

        with sapwood.backend("reference"):
            y = sapwood.ops.masked_matmul(x, weight, mask)

    Args:
        name: "auto", "native", "triton" or "reference".

    Raises:
        ValueError: for another name.
    """
    global _forced
    _check.one_of("backend", "name", name, NAMES)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The backend that is forced at the moment, or "auto"."""
    return _forced


def candidates(backends: Sequence[Backend], *args: Any) -> tuple[Candidate, ...]:
    """Each backend with its reason not to run; those after the first that can are not needed."""
    found: str | None = None
    lines = []
    for b in backends:
        reason = b.why_not(*args)
        if reason is None and _forced not in ("auto", b.name):
            reason = f"backend {_forced!r} is forced"
        if reason is None and found is not None:
            reason = f"can run, but {found} comes first"
        found = found or (b.name if reason is None else None)
        lines.append(Candidate(b.name, reason))
    return tuple(lines)


def choose(op: str, backends: Sequence[Backend], *args: Any) -> Backend:
    """The first backend without a reason, or the forced one.

    Raises:
        RuntimeError: when the forced backend, or every one of them, has a reason not to run.
    """
    reasons = []
    for b in backends:
        if _forced not in ("auto", b.name):
            continue
        reason = b.why_not(*args)
        if reason is None:
            if _log:
                log(op, b.name, *args)
            return b
        reasons.append(f"{b.name}: {reason}")
    why = "; ".join(reasons) or f"it has no backend {_forced!r}"
    raise RuntimeError(f"sapwood.{op}: no backend can run this call ({why})")


def log(op: str, kernel: str, *args: Any) -> None:
    """Prints the choice once per distinct signature when SAPWOOD_LOG=1."""
    if not _log or torch.compiler.is_compiling():
        return
    signature = ", ".join(
        f"{a.dtype}{tuple(a.shape)}@{a.device}" for a in args if isinstance(a, torch.Tensor)
    )
    line = f"sapwood.{op}({signature}): {kernel}"
    if line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr)


def native(op: str, run: Callable[..., Any]) -> Backend:
    """The compiled kernel of an op, for the kinds of device this build has one for."""

    kinds = frozenset(kind for kind in _DISPATCH_KEYS if has_kernel(op, kind))

    def why_not(x: torch.Tensor, *_: Any) -> str | None:
        kind = x.device.type
        return None if kind in kinds else f"this build has no {kind} kernel"

    return Backend("native", why_not, run)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the compiled library has a kernel of its own for this kind of device."""
    key = _DISPATCH_KEYS.get(device_type)
    return key is not None and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"sapwood::{op}", key)
    )
