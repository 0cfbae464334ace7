"""The mask file ``sapwood.mask/1``: packed bits, shapes, aliases and a digest, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

import sapwood
from sapwood.pruning import _container
from sapwood.pruning._names import shape_of

FORMAT = "sapwood.mask/1"
RESERVED = frozenset({"format", "shapes", "aliases", "digest", "created_by", _container.CHECKSUM})


def digest(masks: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and packed bits, in the order of the mapping."""
    return _digest({name: (shape_of(mask), _container.pack(mask)) for name, mask in masks.items()})


def _digest(packed: Mapping[str, tuple[tuple[int, ...], _container.Bytes]]) -> str:
    hashed = hashlib.sha256()
    for name, (shape, bits) in packed.items():
        hashed.update(json.dumps([name, shape]).encode("ascii") + b"\n")
        hashed.update(bits.data)
    return hashed.hexdigest()


def encode(
    masks: Mapping[str, Tensor], aliases: Mapping[str, str], metadata: Mapping[str, str]
) -> bytes:
    """The bytes of a mask file."""
    packed = {name: (shape_of(mask), _container.pack(mask)) for name, mask in masks.items()}
    return _container.encode(
        {name: bits for name, (_, bits) in packed.items()},
        {
            **metadata,
            "format": FORMAT,
            "shapes": json.dumps({name: shape for name, (shape, _) in packed.items()}),
            "aliases": json.dumps(dict(aliases)),
            "digest": _digest(packed),
            "created_by": f"sapwood {sapwood.__version__}",
        },
    )


def decode(content: bytes) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Masks, aliases and user metadata.

    Raises:
        ValueError: for anything that ``encode`` did not write.
    """
    packed, metadata = _container.decode(content)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"the format must be {FORMAT!r}, got {metadata.get('format')!r}")
    masks = _container.unpack_all(packed, metadata.get("shapes"))
    aliases = _container.loads_object(metadata.get("aliases"), "aliases")
    if digest(masks) != metadata.get("digest"):
        raise ValueError("the digest must match the masks, got another one")
    user = {key: value for key, value in metadata.items() if key not in RESERVED}
    return masks, aliases, user
