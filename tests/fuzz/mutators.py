"""Damage to files, blind and with knowledge of their formats.

``mutate`` recognises JSON, safetensors, zip, gzip, PNG and pickle by their first bytes. Half of the
time it ignores what it knows: headers, lengths and checksums are then wrong as chance has it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.fuzz.archives import PNG, edit_gzip, edit_pickle, edit_png, edit_zip
from tests.fuzz.blind import NUMBERS, blind

LENGTH = struct.Struct("<Q")  # of a safetensors header
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, "", "x", "0", "\0", "../x", "a" * 300, "\ud800", "type", "bias", "F64"),
    *([], {}, [[]], [0], [-1], [2**32, 2**32], {"": 0}, 0.5, 1e308, -0.0),
    *(float("inf"), float("nan")),
)
#: Restores the checksums of a container whose header and data were edited.
Repair = Callable[[dict[str, Any], bytes], None]


def mutate(
    content: bytes, random: Random, others: Sequence[bytes] = (), repair: Repair | None = None
) -> bytes:
    """One damaged file; the same one for the same arguments and state of ``random``."""
    damage = blind if random.random() < 0.5 else _of_format(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        try:
            content = damage(content, random, others)
        except Exception:  # what an earlier round damaged may have no structure left
            content = blind(content, random, others)
    if repair is not None and random.random() < 0.8:
        content = repaired(content, repair)
    return content


Damage = Callable[[bytes, Random, Sequence[bytes]], bytes]


def _of_format(content: bytes) -> Damage:
    if content[:1] in (b"{", b"["):
        return edit_json
    if content[:2] == b"PK":
        return edit_zip
    if content[:2] == b"\x1f\x8b":
        return edit_gzip
    if content[:8] == PNG:
        return edit_png
    if content[:1] == b"\x80":
        return edit_pickle
    if content[8:9] == b"{":
        return edit_safetensors
    return blind


# JSON -------------------------------------------------------------------------------------------


def edit_json(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """One node of the tree becomes another, moves, or stands twice."""
    del others
    return json.dumps(edited(json.loads(content), random)).encode("utf-8", "surrogatepass")


def edited(tree: Any, random: Random) -> Any:
    """The tree with one change; texts that hold JSON are edited inside."""
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(list(tree))
        kind = random.random()
        if kind < 0.08:
            return {k: v for k, v in tree.items() if k != key}
        if kind < 0.16:
            name = key + "x" if random.random() < 0.5 else random.choice(("", "0", *tree))
            return {(name if k == key else k): v for k, v in tree.items()}
        if kind < 0.24:
            return {**tree, key + "2": tree[key]}
        return {**tree, key: edited(tree[key], random)}
    if isinstance(tree, list) and tree and random.random() < 0.9:
        at = random.randrange(len(tree))
        kind = random.random()
        if kind < 0.1:
            return tree[:at] + tree[at + 1 :]
        if kind < 0.2:
            return [*tree, *tree[at:]]
        return [*tree[:at], edited(tree[at], random), *tree[at + 1 :]]
    if isinstance(tree, str) and tree[:1] in ("{", "[") and random.random() < 0.9:
        return json.dumps(edited(json.loads(tree), random))
    return _other_leaf(tree, random)


def _other_leaf(leaf: Any, random: Random) -> Any:
    kind = random.random()
    if isinstance(leaf, int | float) and kind < 0.3:
        return leaf + random.choice((-1, 1, 8))
    if kind < 0.33:
        return _deep(random.choice((30, 3000)))
    if isinstance(leaf, int) and kind < 0.6:
        return random.choice(NUMBERS)
    if isinstance(leaf, str) and leaf and kind < 0.6:
        at = random.randrange(len(leaf))
        return leaf[:at] + random.choice(("", "0", "é", "\0", ".", "9")) + leaf[at + 1 :]
    return random.choice(VALUES)


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(min(levels, 900)):  # json.dumps itself goes no deeper
        value = [value]
    return value


# safetensors ------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data.

    Raises:
        ValueError: when there is no header.
    """
    if len(content) < 8:
        raise ValueError("no length")
    (length,) = LENGTH.unpack(content[:8])
    header = json.loads(content[8 : 8 + length].decode())
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, content[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """The file, its header in the spelling that sapwood writes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return LENGTH.pack(len(text)) + text + data


def edit_safetensors(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Header, data, or a name that stands twice."""
    header, data = split(content)
    kind = random.random()
    if kind < 0.2:
        return joined(header, blind(data, random, others))
    if kind < 0.25:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))
        name = random.choice(list(header))
        text = f"{text[:-1]},{json.dumps(name)}:{json.dumps(header[name])}}}"
        return LENGTH.pack(len(text)) + text.encode() + data
    if kind < 0.3:
        text = "[" * random.choice((10, 100_000)) + json.dumps(header)
        return LENGTH.pack(len(text)) + text.encode() + data
    if kind < 0.45:
        return joined(_resized(header, random), data)
    return joined(edited(header, random), data)


def _resized(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """A tensor with other sizes, as far as possible of the same volume."""
    names = [n for n, v in header.items() if isinstance(v, dict) and "shape" in v]
    if not names:
        raise ValueError("no tensor")
    name = random.choice(names)
    shape = list(header[name]["shape"])
    kind = random.randrange(4)
    if kind == 0:
        shape = shape[::-1]
    elif kind == 1:
        shape = [*shape, 1]
    elif kind == 2:
        shape = [2**32, 2**32, *shape]
    else:
        shape = [0, random.choice((2**40, 2**62))]
    return {**header, name: {**header[name], "shape": shape}}


def repaired(content: bytes, repair: Repair) -> bytes:
    """The file with checksums that fit, where it still has the structure for them."""
    try:
        header, data = split(content)
        repair(header, data)
        return joined(header, data)
    except Exception:  # the code under test computes the checksum, and fails on what is damaged
        return content
