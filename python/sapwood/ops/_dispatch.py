"""The dispatch tables of packed weights: built in, measured on this machine, remembered on disk.

``SAPWOOD_DISPATCH`` is ``auto`` (measure once per machine), ``builtin`` (the figures that ship with
the package), or the one format to use. ``SAPWOOD_CACHE_DIR`` is where measurements are kept.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

import sapwood
from sapwood import _check, _load
from sapwood._files import atomic_write_text
from sapwood._measure import cpu_name
from sapwood.ops._cost_model import (
    BUCKETS,
    FORMATS,
    LAYOUT,
    MARGIN,
    DispatchTable,
    Key,
    Surface,
    batch_bucket,
    choose,
    predict,
    useful_formats,
)

__all__ = [
    "BUCKETS",
    "FORMATS",
    "MARGIN",
    "DispatchTable",
    "Key",
    "Surface",
    "batch_bucket",
    "builtin_table",
    "cache_file",
    "calibrate",
    "choose",
    "cpu_isa",
    "device_isa",
    "policy",
    "predict",
    "table_for",
    "useful_formats",
]

POLICIES = ("auto", "builtin", *FORMATS)

_BUILTIN = Path(__file__).with_name("dispatch_builtin.json")
_LARGEST_FILE = 1 << 22  # bytes; a real one holds a few kilobytes per table
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}

_memory: dict[Key, DispatchTable] = {}
_warned: set[str] = set()


def policy() -> str:
    """``SAPWOOD_DISPATCH``: auto, builtin, or the one format to use.

    Raises:
        ValueError: when the variable holds anything else.
    """
    value = os.environ.get("SAPWOOD_DISPATCH") or "auto"
    if value not in POLICIES:
        names = ", ".join(POLICIES)
        raise ValueError(f"sapwood: SAPWOOD_DISPATCH must be one of {names}, got {value!r}")
    return value


def table_for(
    device_type: str, dtype: torch.dtype, *, isa: str | None = None, may_calibrate: bool = True
) -> DispatchTable:
    """The table for a device, a dtype and the current number of threads.

    Measured on this machine when the policy is ``auto``: taken from memory, else from the cache
    file, else measured now (about a second, once per machine). With any other policy, and when
    torch is asked for deterministic algorithms, the built-in table, so that a choice cannot depend
    on the noise of a measurement. A format that the policy names is the table's ``only``.

    >>> table_for("cpu", torch.float32, may_calibrate=False).key.device
    'cpu'

    Args:
        device_type: "cpu" or "cuda".
        dtype: of values and activations.
        isa: instruction set, by default that of ``device_isa``.
        may_calibrate: whether to spend a second on measuring; without it a missing table is
            replaced by that of the nearest number of threads, or the built-in one. Pass False
            in a hot path.

    Raises:
        TypeError: for a dtype without kernels.
        ValueError: when ``SAPWOOD_DISPATCH`` is not understood.
    """
    name = _dtype_name("table_for", dtype)
    here = device_isa(device_type)
    key = Key(device_type, here if isa is None else isa, name, torch.get_num_threads())
    mode = policy()
    if mode != "auto" or torch.are_deterministic_algorithms_enabled():
        table = builtin_table(key)
        return replace(table, only=mode) if mode in FORMATS else table
    if key in _memory:
        return _memory[key]
    _memory.update({k: t for k, t in _read_cache().items() if k not in _memory})
    if key in _memory:
        return _memory[key]
    if may_calibrate and key.isa == here and _clock_is_meaningful():
        return calibrate(device=device_type, dtype=dtype)
    measured = [t for k, t in _memory.items() if replace(k, threads=key.threads) == key]
    if measured:
        return min(measured, key=lambda t: abs(t.key.threads - key.threads))
    return builtin_table(key)


def _clock_is_meaningful() -> bool:
    """False while torch traces or runs on fake tensors: nothing is computed then."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def calibrate(
    *,
    seconds: float = 1.0,
    force: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DispatchTable:
    """Measures dense and packed products on this machine and remembers the costs.

    On a machine too busy for it the built-in table is used, with a warning, and nothing is kept.

    Example:
        >>> table = calibrate(seconds=0.1)
        >>> sorted(table.surfaces)
        ['bitmap', 'csr', 'dense', 'sell']

    Args:
        seconds: how long to measure; at least two rounds are completed, and up to three times
            as much is spent while other programs disturb the measurement.
        force: measure even when the cache holds a table.
        threads: torch threads to measure with; default the current number.
        device: "cpu" or "cuda".
        dtype: of values and activations.

    Returns:
        The table, which ``pack_sparse(format="auto")`` uses from now on.

    Raises:
        TypeError: for a dtype without kernels.
        ValueError: when seconds is not positive and finite, or threads is below 1.
    """
    name = _dtype_name("calibrate", dtype)
    if not 0 < seconds < float("inf"):
        _check.fail(ValueError, "calibrate", "seconds", "be positive and finite", seconds)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        _check.fail(ValueError, "calibrate", "threads", "be at least 1", threads)
    key = Key(device, device_isa(device), name, threads)
    cached = _read_cache()
    if key in cached and not force:
        _memory[key] = cached[key]
        return cached[key]
    table = _measured(key, dtype, seconds)
    _memory[key] = table
    if table.source == "calibrated":
        _write_cache({**cached, key: table})
    return table


def _measured(key: Key, dtype: torch.dtype, seconds: float) -> DispatchTable:
    """A fresh table, or with a warning the built-in one where the machine is too busy for it."""
    from sapwood.ops import _calibrate  # only here: most processes never measure

    before = torch.get_num_threads()
    if key.threads != before:
        torch.set_num_threads(key.threads)
    try:
        table, noise = _calibrate.measure(key, dtype, seconds=seconds)
    finally:
        if key.threads != before:
            torch.set_num_threads(before)
    if noise <= _calibrate.TOO_NOISY:
        return table
    _warn_once(
        f"sapwood: this machine is too busy to measure (times vary by {noise:.0%}); packed "
        "weights are dispatched by the built-in table until sapwood.ops.calibrate() succeeds"
    )
    return builtin_table(key)


def builtin_table(key: Key) -> DispatchTable:
    """The table that ships with the package: of the same device, instruction set and dtype, and
    the nearest number of threads.

    Where nothing was measured (GPUs so far) the table knows only the dense product, so nothing
    else is ever chosen before ``calibrate`` ran there.

    >>> builtin_table(Key("cpu", "avx2", "float32", threads=64)).source
    'builtin'
    """
    fitting = [t for t in builtin_tables() if replace(t.key, threads=key.threads) == key]
    if fitting:
        return min(fitting, key=lambda t: abs(t.key.threads - key.threads))
    dense = Surface(overhead=0.0, batches=(1,), densities=(1.0,), costs=(((0.0,),),))
    return DispatchTable(
        key=key,
        sides=(1024,),
        surfaces={"dense": dense},
        version=sapwood.__version__,
        source="builtin (dense only: not measured)",
    )


def device_isa(device: str) -> str:
    """The instruction set the kernels of a device use, as in ``Key.isa``."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return cpu_isa()


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: the best of this CPU within the user's bound."""
    order = ("default", "avx2", "avx512")
    bound = os.environ.get("SAPWOOD_CPU_CAPABILITY") or "avx512"
    return order[min(order.index(bound) if bound in order else 2, _best_isa())]


@lru_cache(maxsize=1)
def _best_isa() -> int:
    if _load.native is None:
        return {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)
    features = set(_load.native.cpu_features())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= features:
        return 2
    return 1 if {"avx2", "fma"} <= features else 0


@lru_cache(maxsize=1)
def builtin_tables() -> tuple[DispatchTable, ...]:
    content = json.loads(_BUILTIN.read_text(encoding="utf-8"))
    return tuple(DispatchTable.from_dict(table, "builtin") for table in content["tables"])


def cache_file() -> Path:
    """Where measured tables of this machine and this version of sapwood are kept."""
    folder = os.environ.get("SAPWOOD_CACHE_DIR")
    machine = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    name = f"dispatch-{machine}-{sapwood.__version__}.json"
    return (Path(folder) if folder else _user_cache()) / name


@lru_cache(maxsize=1)
def _build() -> str:
    return _load.build_id()


def _user_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sapwood"


def _read_cache() -> dict[Key, DispatchTable]:
    """The tables of the cache file; none, with one warning, when the file is not ours."""
    path = cache_file()
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = {"layout": LAYOUT, "cpu": cpu_name(), "version": sapwood.__version__}
        if not isinstance(content, dict) or not isinstance(content.get("tables"), list):
            raise ValueError("it does not hold a list of tables")
        for field, value in expected.items():
            if content.get(field) != value:
                raise ValueError(f"its {field} is {content.get(field)!r}, here it is {value!r}")
        if content.get("build") != _build():
            return {}  # measured with other kernels, or against another torch: measure anew
        tables = [DispatchTable.from_dict(table, str(path)) for table in content["tables"]]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(f"sapwood: ignoring the dispatch cache {path}: {error}")
        return {}
    return {table.key: table for table in tables}


def _write_cache(tables: dict[Key, DispatchTable]) -> None:
    """Replaces the cache file as a whole; where that is impossible the tables stay in memory."""
    path = cache_file()
    content = {
        "layout": LAYOUT,
        "cpu": cpu_name(),
        "version": sapwood.__version__,
        "build": _build(),
        "tables": [table.to_dict() for table in tables.values()],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(content))
    except OSError as error:
        _warn_once(f"sapwood: the dispatch table is kept in memory only: {error}")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def _dtype_name(function: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        _check.fail(TypeError, function, "dtype", f"be one of {', '.join(_DTYPES)}", dtype)
    return name
