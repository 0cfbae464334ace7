"""Damage to files, blind and with knowledge of their formats.

``mutate`` recognises JSON, safetensors, zip, gzip, PNG and pickle by their first bytes. Half of the
time it ignores what it knows: headers, lengths and checksums are then wrong as chance has it.
"""

from __future__ import annotations

import gzip
import io
import json
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

LENGTH = struct.Struct("<Q")  # of a safetensors header
PNG = b"\x89PNG\r\n\x1a\n"
NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        7,
        8,
        9,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**27,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
    ),
    *(2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400),
)
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


# blind ------------------------------------------------------------------------------------------


def blind(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Bits, bytes, integers, blocks; cut, grown, or spliced with another file."""
    action = random.choice(
        (_flip, _flip, _byte, _integer, _integer, _remove, _insert, _repeat, _cut, _grow)
    )
    if others and random.random() < 0.1:
        other = random.choice(others)
        return content[: _place(content, random)] + other[_place(other, random) :]
    return action(content, random)


def _place(content: bytes, random: Random) -> int:
    """Anywhere; often near an end, where headers and directories are."""
    size = len(content)
    kind = random.random()
    if kind < 0.3:
        return random.randint(0, min(size, 64))
    if kind < 0.5:
        return size - random.randint(0, min(size, 64))
    return random.randint(0, size)


def _flip(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    if at == len(content):
        return content + b"\0"
    return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]


def _byte(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + bytes([random.choice((0, 1, 127, 128, 255, 34))]) + content[at + 1 :]


def _integer(content: bytes, random: Random) -> bytes:
    at, width = _place(content, random), random.choice((2, 4, 8))
    value = random.choice(NUMBERS) % (1 << 8 * width)
    order = "little" if random.random() < 0.5 else "big"
    return content[:at] + value.to_bytes(width, order) + content[at + width :]  # type: ignore[arg-type]


def _remove(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + content[at + random.randint(1, 40) :]


def _insert(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + random.randbytes(random.randint(1, 12)) + content[at:]


def _repeat(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    block = content[at : at + random.randint(1, 80)]
    return content[:at] + block * random.randint(2, 4) + content[at + len(block) :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: _place(content, random)]


def _grow(content: bytes, random: Random) -> bytes:
    return content + bytes(random.choice((1, 3, 8, 4096)))


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


# zip, gzip, PNG, pickle -------------------------------------------------------------------------


def edit_zip(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Members renamed, doubled, left out, damaged, enormous or packed otherwise."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = random.randrange(len(members))
    name, payload = members[at]
    kind, packing = random.randrange(7), zipfile.ZIP_STORED
    if kind == 0:
        members[at] = (random.choice(("", "/", "../x", "train/a/b.jpg", name + "\0", "é")), payload)
    elif kind == 1:
        members.append(members[at])
    elif kind == 2:
        del members[at]
    elif kind == 3:
        members[at] = (name, blind(payload, random, others))
    elif kind == 4:
        members[at], packing = (
            (name, bytes(random.choice((1 << 16, 1 << 20)))),
            zipfile.ZIP_DEFLATED,
        )
    elif kind == 5:
        packing = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        return _zip_field(content, random)
    target = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", packing) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        archive.comment = random.choice((b"", b"", b"PK\5\6"))
        for name, payload in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = packing
            archive.writestr(info, payload)
    return target.getvalue()


def _zip_field(content: bytes, random: Random) -> bytes:
    """A field of a header, found by its signature."""
    signature = random.choice((b"PK\1\2", b"PK\3\4", b"PK\5\6"))
    places = []
    at = content.find(signature)
    while at >= 0:
        places.append(at)
        at = content.find(signature, at + 4)
    at = random.choice(places) + 4 + 2 * random.randrange(21)
    width = random.choice((2, 4))
    value = random.choice(NUMBERS) % (1 << 8 * width)
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


def edit_gzip(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """What is packed is damaged, and packed again."""
    plain = gzip.decompress(content)
    if random.random() < 0.1:
        return content + content  # two members
    return gzip.compress(blind(plain, random, others), 1, mtime=0)


def edit_png(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """One chunk damaged, doubled or left out, its checksum right."""
    chunks = _png_chunks(content)
    at = random.randrange(len(chunks))
    name, payload = chunks[at]
    kind = random.randrange(6)
    if kind < 3:
        chunks[at] = (name, blind(payload, random, others))
    elif kind == 3:
        chunks.insert(at, chunks[at])
    elif kind == 4:
        del chunks[at]
    else:
        name = random.choice((b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fdAT"))
        chunks.insert(at, (name, random.randbytes(random.randint(0, 40))))
    body = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )
    return PNG + b"".join(body)


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        raise ValueError("no chunk")
    return chunks


def edit_pickle(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Opcodes left out, doubled, exchanged, or new."""
    del others
    starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    ops = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    at, other = random.randrange(len(ops)), random.randrange(len(ops))
    kind = random.randrange(5)
    if kind == 0:
        del ops[at]
    elif kind == 1:
        ops.insert(at, ops[other])
    elif kind == 2:
        ops[at], ops[other] = ops[other], ops[at]
    elif kind == 3:
        new = (
            b"R",
            b"b",
            b"(",
            b"t",
            b"0",
            b"2",
            b"cos\nsystem\n",
            b"\x93",
            b"\x81",
            b"N",
            b"}",
            b"]",
        )
        ops.insert(at, random.choice(new))
    else:
        ops[at] = blind(ops[at], random)
    return b"".join(ops)
