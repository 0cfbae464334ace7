"""Damage that knows nothing of formats: bits, bytes, integers, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

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
