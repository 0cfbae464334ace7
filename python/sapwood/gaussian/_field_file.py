"""The file ``sapwood.gaussian_field``, version 1: a strict, deterministic safetensors container.

The same field always gives the same bytes, and a checksum over metadata and data lets the reader
refuse every corruption. ``half`` files hold shapes and features in float16 and the centres as 16
bit fixed point over the image, because float16 would lose a quarter of a pixel at x = 512.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT, VERSION = "sapwood.gaussian_field", "1"
MAX_BYTES = 1 << 30  # of a file
MAX_PIXELS = 1 << 28
MAX_CHANNELS = 1 << 12
_MAX_HEADER = 1 << 12
_FIELDS = {"format", "version", "height", "width", "mode", "cutoff", "checksum"}
_CODES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
}
_FULL = {"chol": "F32", "feat": "F32", "mu": "F32"}
_HALF = {"chol": "F16", "feat": "F16", "mu": "U16"}
_LEVELS = 65535

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """What a file holds, in float32."""

    mu: Array  # (N, 2)
    chol: Array  # (N, 3)
    feat: Array  # (N, C)
    height: int
    width: int
    mode: str
    cutoff: float


def encode(stored: Stored, *, half: bool) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: when ``half`` cannot hold the numbers, or the image is too large to load.
    """
    if stored.height * stored.width > MAX_PIXELS:
        size = (stored.height, stored.width)
        raise ValueError(f"the image must have at most {MAX_PIXELS} pixels, got {size}")
    arrays = {"chol": stored.chol, "feat": stored.feat, "mu": stored.mu}
    if half:
        arrays = _halved(stored)
    data = {n: a.astype(_CODES[(_HALF if half else _FULL)[n]]) for n, a in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "height": str(stored.height),
        "width": str(stored.width),
        "mode": stored.mode,
        "cutoff": repr(stored.cutoff),
    }
    return assemble(metadata, data)


def assemble(metadata: Mapping[str, str], data: Mapping[str, Array]) -> bytes:
    """Header and data, with the checksum added to the metadata."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    entries: dict[str, Any] = {}
    offset = 0
    for name in sorted(data):
        end = offset + data[name].nbytes
        entries[name] = {
            "dtype": codes[data[name].dtype],
            "shape": list(data[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    body = b"".join(data[name].tobytes() for name in sorted(data))
    checksum = _checksum(metadata, entries, body)
    text = _json({"__metadata__": {**metadata, "checksum": checksum}, **entries})
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def decode(content: bytes) -> Stored:
    """Parses what ``encode`` wrote.

    Raises:
        ValueError: for anything else, down to a single flipped bit.
    """
    header, body = _split(content)
    metadata = _metadata(header.pop("__metadata__", None))
    if metadata.pop("checksum") != _checksum(metadata, header, body):
        raise ValueError("the checksum must match the content, got another one")
    kinds = {name: _dtype(entry) for name, entry in header.items()}
    if kinds not in (_FULL, _HALF):
        raise ValueError(f"the tensors must be mu, chol and feat, float32 or halved, got {kinds}")
    height, width = _size(metadata)
    mode, cutoff = metadata["mode"], _cutoff(metadata["cutoff"])
    if mode not in ("sum", "norm"):
        raise ValueError(f"mode must be sum or norm, got {mode!r}")
    mu, chol, feat = _tensors(header, body)
    if mu.dtype == np.uint16:
        mu = _positions(mu, height, width)
    stored = Stored(
        mu.astype(np.float32),
        chol.astype(np.float32),
        feat.astype(np.float32),
        height,
        width,
        mode,
        cutoff,
    )
    _check_values(stored)
    return stored


def _halved(stored: Stored) -> dict[str, Array]:
    sizes = np.array([stored.width, stored.height], np.float64)
    place = (stored.mu.astype(np.float64) + 0.5) / sizes
    if place.size and not (place.min() >= 0 and place.max() <= 1):
        raise ValueError("half must have all centres inside the image, got some outside")
    with np.errstate(over="ignore"):
        chol, feat = stored.chol.astype(np.float16), stored.feat.astype(np.float16)
    if not (np.isfinite(chol).all() and np.isfinite(feat).all() and (chol[:, ::2] > 0).all()):
        raise ValueError("half must have numbers that float16 holds, got larger or smaller ones")
    return {"chol": chol, "feat": feat, "mu": np.rint(place * _LEVELS)}


def _positions(levels: Array, height: int, width: int) -> Array:
    sizes = np.array([width, height], np.float64)
    positions: Array = levels / _LEVELS * sizes - 0.5
    return positions


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _checksum(metadata: Mapping[str, str], entries: Mapping[str, Any], body: bytes) -> str:
    digest = hashlib.sha256(_json([dict(metadata), dict(entries)]))
    digest.update(body)
    return digest.hexdigest()


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    if len(content) < 8:
        raise ValueError(f"the file must hold at least 8 bytes, got {len(content)}")
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, _MAX_HEADER) or length % 8:
        raise ValueError(f"the header must fit the file, got a length of {length}")
    text = content[8 : 8 + length].rstrip(b" ")
    try:
        header = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header must be JSON, got {type(error).__name__}") from None
    # one spelling only: duplicate keys and other escapes would pass unseen by the checksum
    if not isinstance(header, dict) or _json(header) != text:
        raise ValueError("the header must be canonical JSON, got another spelling")
    return header, content[8 + length :]


def _metadata(value: object) -> dict[str, str]:
    if (
        not isinstance(value, dict)
        or set(value) != _FIELDS
        or not all(isinstance(text, str) for text in value.values())
    ):
        raise ValueError(f"the metadata must be the texts {', '.join(sorted(_FIELDS))}")
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        got = f"{value['format']!r} {value['version']!r}"
        raise ValueError(f"the format must be {FORMAT} {VERSION}, got {got}")
    return value


def _size(metadata: Mapping[str, str]) -> tuple[int, int]:
    sides = []
    for name in ("height", "width"):
        text = metadata[name]
        if not (text.isascii() and text.isdigit() and len(text) < 10 and text[0] != "0"):
            raise ValueError(f"{name} must be a whole number above 0, got {text[:20]!r}")
        sides.append(int(text))
    if sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(f"the image must have at most {MAX_PIXELS} pixels, got {sides}")
    return sides[0], sides[1]


def _cutoff(text: str) -> float:
    try:
        value = float(text) if len(text) < 40 else math.nan
    except ValueError:
        value = math.nan
    if not value > 0 or repr(value) != text:
        raise ValueError(f"cutoff must be a positive number, got {text[:20]!r}")
    return value


def _tensors(entries: Mapping[str, Any], body: bytes) -> tuple[Array, Array, Array]:
    arrays: dict[str, Array] = {}
    offset, n = 0, None
    for name in sorted(entries):  # chol, feat, mu
        entry = entries[name]
        dtype, shape = _CODES[entry["dtype"]], entry.get("shape")
        if not _is_shape(shape) or shape[0] != (shape[0] if n is None else n):
            raise ValueError(f"{name} must have N rows, got shape {shape!r}")
        n = shape[0]
        end = offset + n * shape[1] * dtype.itemsize
        expected = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [offset, end]}
        if entry != expected or end > len(body):
            raise ValueError(f"{name} must lie at offset {offset} of the data, got {entry!r}")
        flat = np.frombuffer(body, dtype, n * shape[1], offset)
        arrays[name], offset = flat.reshape(n, shape[1]), end
    if offset != len(body):
        raise ValueError(f"the data must be {offset} bytes long, got {len(body)}")
    mu, chol, feat = arrays["mu"], arrays["chol"], arrays["feat"]
    if mu.shape[1] != 2 or chol.shape[1] != 3 or not 1 <= feat.shape[1] <= MAX_CHANNELS:
        shapes = f"{mu.shape}, {chol.shape}, {feat.shape}"
        raise ValueError(f"mu, chol, feat must have shapes (N, 2), (N, 3), (N, C), got {shapes}")
    return mu, chol, feat


def _dtype(entry: object) -> object:
    return entry.get("dtype") if isinstance(entry, dict) else None


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and 0 <= size < 2**40 for size in value)
    )


def _check_values(stored: Stored) -> None:
    for name in ("mu", "chol", "feat"):
        if not np.isfinite(getattr(stored, name)).all():
            raise ValueError(f"{name} must be finite, got NaN or inf")
    if not (stored.chol[:, ::2] > 0).all():
        raise ValueError("chol must have positive l1 and l3, got others")
