"""Damage to zip archives, gzip, PNG and pickles that keeps them what they are."""

from __future__ import annotations

import gzip
import io
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from random import Random

from tests.fuzz.blind import NUMBERS, blind

PNG = b"\x89PNG\r\n\x1a\n"


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
