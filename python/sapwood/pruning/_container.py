"""A strict, deterministic safetensors container.

The layout is that of the safetensors library, which reads these files. Ours differs in two ways:
the same content always gives the same bytes, and a checksum over the whole file in the metadata
lets the reader refuse every corruption instead of most.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHECKSUM = "checksum"
_PACKED = "U8"
_LENGTH_BYTES = 8

#: A flat uint8 array.
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def pack(mask: Tensor) -> Bytes:
    """Bits of a bool tensor in C order, little-endian, padded with zeros: (ceil(numel / 8),)."""
    flat = mask.detach().reshape(-1).cpu().numpy()
    return np.packbits(flat, bitorder="little")


def unpack(packed: Bytes, shape: tuple[int, ...], name: str) -> Tensor:
    """The inverse of ``pack``.

    Raises:
        ValueError: when the length does not fit the shape or a padding bit is set.
    """
    numel = math.prod(shape)
    if packed.size != (numel + 7) // 8:
        raise ValueError(
            f"mask {name} must hold {(numel + 7) // 8} bytes for shape {shape}, got {packed.size}"
        )
    if numel % 8 and packed[-1] >> (numel % 8):
        raise ValueError(f"mask {name} must have zero padding bits, got {int(packed[-1]):#04x}")
    bits = np.unpackbits(packed, count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Bytes]) -> str:
    sizes = {name: int(data.size) for name, data in tensors.items()}
    digest = hashlib.sha256()
    digest.update(_json([dict(metadata), sizes]))
    for name in sorted(tensors):
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def encode(tensors: Mapping[str, Bytes], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a container that holds flat uint8 tensors and string metadata."""
    header: dict[str, Any] = {
        "__metadata__": {**metadata, CHECKSUM: _checksum(metadata, tensors)},
    }
    offset = 0
    for name in sorted(tensors):
        end = offset + int(tensors[name].size)
        header[name] = {
            "dtype": _PACKED,
            "shape": [int(tensors[name].size)],
            "data_offsets": [offset, end],
        }
        offset = end
    text = _json(header)
    text += b" " * (-len(text) % _LENGTH_BYTES)
    body = b"".join(tensors[name].tobytes() for name in sorted(tensors))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + body


def decode(
    content: bytes,
) -> tuple[dict[str, Bytes], dict[str, str]]:
    """Parses what ``encode`` wrote.

    Raises:
        ValueError: for anything that ``encode`` did not write, down to a single flipped bit.
    """
    header, body = _split(content)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the header must hold string metadata, got none")
    expected = metadata.pop(CHECKSUM, None)
    tensors: dict[str, Bytes] = {}
    offset = 0
    for name in sorted(header):
        size = _entry_size(name, header[name], offset)
        if offset + size > len(body):
            raise ValueError(f"{name} must lie inside the file, got an end beyond it")
        tensors[name] = np.frombuffer(body, dtype=np.uint8, count=size, offset=offset)
        offset += size
    if offset != len(body):
        raise ValueError(f"the data must be {offset} bytes long, got {len(body)}")
    if expected != _checksum(metadata, tensors):
        raise ValueError("the checksum must match the content, got another one")
    return tensors, metadata


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(content) < _LENGTH_BYTES:
        raise ValueError(f"the file must hold at least 8 bytes, got {len(content)}")
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if length > len(content) - _LENGTH_BYTES or length % _LENGTH_BYTES:
        raise ValueError(
            f"the header must fit the file of {len(content)} bytes, got a length of {length}"
        )
    start = _LENGTH_BYTES + length
    text = content[_LENGTH_BYTES:start].rstrip(b" ")
    try:
        header = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header must be JSON, got {type(error).__name__}") from None
    # only the one canonical spelling of the header is accepted: duplicates, other white space and
    # other escapes would otherwise pass unseen by the checksum
    if not isinstance(header, dict) or _json(header) != text:
        raise ValueError("the header must be canonical JSON, got another spelling")
    return header, memoryview(content)[start:]


def _entry_size(name: str, entry: object, offset: int) -> int:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    size = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name} must have one non-negative dimension, got {shape!r}")
    described = {"dtype": _PACKED, "shape": [size], "data_offsets": [offset, offset + size]}
    if entry != described:
        raise ValueError(f"{name} must be a uint8 tensor at offset {offset}, got {entry!r}")
    return size


def loads_object(text: str | None, name: str) -> dict[str, Any]:
    """A JSON object out of a metadata string."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text!r}")
    return value


def unpack_all(packed: Mapping[str, Bytes], shapes: str | None) -> dict[str, Tensor]:
    """Masks in the order of the JSON object ``shapes``, name -> list of dimensions.

    Raises:
        ValueError: when names, dimensions or lengths disagree.
    """
    described = loads_object(shapes, "shapes")
    if set(described) != set(packed):
        raise ValueError("shapes must name exactly the masks of the file, got other names")
    masks: dict[str, Tensor] = {}
    for name, dims in described.items():
        if not isinstance(dims, list) or not all(
            isinstance(d, int) and not isinstance(d, bool) and 0 <= d < 2**48 for d in dims
        ):
            raise ValueError(f"the shape of {name} must be a list of sizes, got {dims!r}")
        masks[name] = unpack(packed[name], tuple(dims), name)
    return masks
