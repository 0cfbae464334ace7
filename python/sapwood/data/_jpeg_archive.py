"""Images in a zip archive of JPEGs, train/<class>/*.jpg and test/<class>/*.jpg.

The archive may come from anywhere: nothing of it is ever written to a disk, and sizes are checked
before anything is decoded.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from sapwood.data._pixels import Pixels
from sapwood.data.dataset import MissingDataError

_MOST_IMAGES = 1 << 18
_MOST_BYTES = 1 << 30  # of all members, unpacked
_MOST_BYTES_PER_IMAGE = 1 << 16  # 32 x 32 pixels take about a thousand
_LAYOUT = re.compile(r"(train|test)/([^/]+)/[^/]+\.jpe?g")
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_END = struct.Struct("<4s4H2LH")  # the last record of an archive
_COUNTED_ELSEWHERE = 0xFFFF  # that many entries or more, in the Zip64 format
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,  # a packing or encryption that zipfile does not know
    RuntimeError,  # a password
    UnicodeDecodeError,
    ValueError,  # a negative position
    struct.error,
    zlib.error,
)

#: Members by class, each class in the order of their names.
Members = Sequence[Sequence[zipfile.ZipInfo]]


def read_jpeg_archive(
    path: Path, classes: Sequence[str], size: tuple[int, int], per_class: int | None, where: str
) -> tuple[Pixels, Pixels]:
    """Training and test images; of the former, the first ``per_class`` of each class.

    Raises:
        MissingDataError: if the archive has no images of a class.
        ModuleNotFoundError: if Pillow is not installed.
        ValueError: if the archive or an image is damaged, too large, or not in its place.
    """
    decoder = _pillow(where)
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise ValueError(f"{where}: {path} must be an intact zip archive: {error}") from None
    with archive:
        _require_whole_directory(archive, path, f"{where}: {path}")
        splits = _members(archive, classes, f"{where}: {path}")
        train = splits["train"]
        if per_class is not None:
            train = _first(train, classes, per_class, where)
        return (
            _decode(archive, train, size, decoder, f"{where}: {path}"),
            _decode(archive, splits["test"], size, decoder, f"{where}: {path}"),
        )


def _require_whole_directory(archive: zipfile.ZipFile, path: Path, where: str) -> None:
    """Damage can hide entries within another entry's comment, which zipfile does not notice."""
    found = len(archive.infolist())
    with path.open("rb") as file:
        file.seek(-(_END.size + len(archive.comment)), io.SEEK_END)
        signature, _, _, _, announced, *_ = _END.unpack(file.read(_END.size))
    is_counted = announced == found or announced == _COUNTED_ELSEWHERE <= found
    if signature != b"PK\5\6" or not is_counted:
        raise ValueError(f"{where} must have a directory of {announced} entries, got {found}")
    if found and min(info.header_offset for info in archive.infolist()) != 0:
        raise ValueError(f"{where} must begin with a member")


def _pillow(where: str) -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{where}: Pillow must be installed for an archive of JPEGs: "
            "pip install 'sapwood[tour]'"
        ) from None
    return Image


def _members(archive: zipfile.ZipFile, classes: Sequence[str], where: str) -> Mapping[str, Members]:
    """All images, sorted; their number and sizes are bounded here."""
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    total = sum(info.file_size for info in infos)
    if len(infos) > _MOST_IMAGES or total > _MOST_BYTES:
        raise ValueError(
            f"{where} must hold at most {_MOST_IMAGES} images of {_MOST_BYTES} bytes in all, "
            f"got {len(infos)} of {total}"
        )
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError(f"{where} must hold every name once, got some twice")
    splits: dict[str, list[list[zipfile.ZipInfo]]] = {
        split: [[] for _ in classes] for split in ("train", "test")
    }
    for info in sorted(infos, key=lambda info: info.filename):
        place = _LAYOUT.fullmatch(info.filename)
        if place is None or place[2] not in classes:
            raise ValueError(
                f"{where} must hold nothing but train/<class>/*.jpg and test/<class>/*.jpg of the "
                f"classes {', '.join(classes)}, got {info.filename[:80]!r}"
            )
        if info.file_size > _MOST_BYTES_PER_IMAGE or info.compress_type not in _PACKINGS:
            raise ValueError(
                f"{where}: member {info.filename!r} must be stored or deflated and have at most "
                f"{_MOST_BYTES_PER_IMAGE} bytes, got {info.file_size}"
            )
        splits[place[1]][classes.index(place[2])].append(info)
    for split, members in splits.items():
        for name, found in zip(classes, members, strict=True):
            if not found:
                raise MissingDataError(f"{where}: {split}/{name}/*.jpg does not exist in it")
    return splits


def _first(members: Members, classes: Sequence[str], count: int, where: str) -> Members:
    for name, found in zip(classes, members, strict=True):
        if len(found) < count:
            raise ValueError(
                f"{where}: per_class must be at most {len(found)}, the number of training images "
                f"of class {name!r}, got {count}"
            )
    return [found[:count] for found in members]


def _decode(
    archive: zipfile.ZipFile,
    members: Members,
    size: tuple[int, int],
    decoder: ModuleType,
    where: str,
) -> Pixels:
    rows = [(info, label) for label, found in enumerate(members) for info in found]
    area = size[0] * size[1]
    values = np.empty((len(rows), 3, area), dtype=np.uint8)
    for target, (info, _) in zip(values, rows, strict=True):
        try:
            content = archive.read(info)  # checks its CRC-32
        except _DAMAGE as error:
            raise ValueError(f"{where}: member {info.filename!r} must be intact: {error}") from None
        pixels = _rgb(content, size, decoder, f"{where}: member {info.filename!r}")
        target[:] = np.frombuffer(pixels, dtype=np.uint8).reshape(area, 3).T
    labels = np.array([label for _, label in rows], dtype=np.int64)
    return Pixels(values.reshape(len(rows), 3 * area), labels)


def _rgb(content: bytes, size: tuple[int, int], decoder: ModuleType, where: str) -> bytes:
    """Pixels (height, width, 3) of one image."""
    expected = f"{where} must be an intact JPEG of {size[0]} x {size[1]} pixels in RGB"
    try:
        image = decoder.open(io.BytesIO(content), formats=("JPEG",))
        found = (image.mode, image.size)  # known from the header, before anything is decoded
        pixels: bytes = image.tobytes() if found == ("RGB", size) else b""
    except Exception as error:  # Pillow raises errors of many kinds for damaged images
        raise ValueError(f"{expected}: {error}") from None
    if not pixels:
        raise ValueError(f"{expected}, got {found[1][0]} x {found[1][1]} in {found[0]}")
    return pixels
