"""Writers of tiny CIFAR-10 data sets in every form that the reader knows."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@dataclass(frozen=True)
class Tiny:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of six files, the last for testing."""

    images: list[NDArray[np.uint8]]
    labels: list[list[int]]

    def split(self, test: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        part = slice(5, 6) if test else slice(0, 5)
        return np.concatenate(self.images[part]), np.concatenate(self.labels[part])


def smooth(count: int, seed: int) -> NDArray[np.uint8]:
    """Images of a few colours that JPEG keeps almost as they are."""
    corners = np.random.default_rng(seed).integers(0, 256, (count, 3, 2, 2), dtype=np.uint8)
    images = [Image.fromarray(corner.transpose(1, 2, 0)) for corner in corners]
    grown = [image.resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in grown])


def tiny(per_file: int = 4, test: int = 10) -> Tiny:
    """At least two training images and one test image of each class, the classes mixed."""
    sizes = [per_file] * 5 + [test]
    labels = np.concatenate([np.arange(sum(sizes[:5])) * 7 % 10, np.arange(test) * 3 % 10])
    ends = np.cumsum(sizes)[:-1]
    pixels = smooth(sum(sizes), seed=1)
    return Tiny(np.split(pixels, ends), [part.tolist() for part in np.split(labels, ends)])


def write_binary(folder: Path, data: Tiny) -> None:
    for name, images, labels in zip(NAMES, data.images, data.labels, strict=True):
        records = [
            bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
        ]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


def write_python(
    folder: Path, data: Tiny, encode: Callable[[NDArray[np.uint8], list[int]], bytes]
) -> None:
    for name, images, labels in zip(NAMES, data.images, data.labels, strict=True):
        (folder / name).write_bytes(encode(images.reshape(len(images), -1), labels))


def python3_batch(
    protocol: int, order: str = "C"
) -> Callable[[NDArray[np.uint8], list[int]], bytes]:
    """What Python 3 writes at a protocol."""

    def encode(values: NDArray[np.uint8], labels: list[int]) -> bytes:
        array: Any = np.array(values, order=order)  # type: ignore[call-overload]
        batch = {
            "batch_label": "testing batch 1 of 1",
            "labels": labels,
            "data": array,
            "filenames": [f"{label}.png" for label in labels],
        }
        return pickle.dumps(batch, protocol=protocol)

    return encode


def python2_batch(values: NDArray[np.uint8], labels: list[int]) -> bytes:
    """What Python 2 wrote at protocol 2, and what the published files are: texts are bytes."""
    memory = iter(range(1 << 16))

    def kept(opcodes: bytes) -> bytes:
        slot = next(memory)
        if slot < 256:
            return opcodes + b"q" + bytes([slot])  # BINPUT
        return opcodes + b"r" + struct.pack("<I", slot)  # LONG_BINPUT

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    def integer(value: int) -> bytes:
        if value < 256:
            return b"K" + bytes([value])  # BININT1
        return b"M" + struct.pack("<H", value)  # BININT2

    def several(items: Iterable[bytes]) -> bytes:
        return kept(b"]") + b"(" + b"".join(items) + b"e"  # EMPTY_LIST, MARK, APPENDS

    entries = kept(text(b"batch_label")) + kept(text(b"testing batch 1 of 1"))
    entries += kept(text(b"labels")) + several(map(integer, labels))
    entries += kept(text(b"data"))
    entries += kept(b"cnumpy.core.multiarray\n_reconstruct\n")  # GLOBAL
    entries += kept(b"cnumpy\nndarray\n") + kept(integer(0) + b"\x85")  # TUPLE1
    entries += kept(text(b"b")) + kept(b"\x87") + kept(b"R")  # TUPLE3, REDUCE
    entries += b"(" + integer(1) + kept(b"".join(map(integer, values.shape)) + b"\x86")  # TUPLE2
    entries += kept(b"cnumpy\ndtype\n") + kept(text(b"u1")) + integer(0) + integer(1)
    entries += kept(b"\x87") + kept(b"R") + b"(" + integer(3) + kept(text(b"|"))
    entries += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff" + integer(0) + kept(b"t") + b"b"  # BUILD
    entries += b"\x89" + kept(text(values.tobytes())) + kept(b"t") + b"b"  # NEWFALSE, TUPLE
    entries += kept(text(b"filenames")) + several(kept(text(b"%d.png" % i)) for i in labels)
    return b"\x80\x02" + kept(b"}") + b"(" + entries + b"u."  # PROTO, EMPTY_DICT, SETITEMS, STOP


def jpeg(image: NDArray[np.uint8], mode: str = "RGB") -> bytes:
    """(3, height, width) as a JPEG of the best quality."""
    file = io.BytesIO()
    converted = Image.fromarray(image.transpose(1, 2, 0)).convert(mode)
    converted.save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def jpeg_members(data: Tiny) -> dict[str, bytes]:
    """Names and contents; each class counts its images in the order of the files."""
    members = {}
    for split, is_test in (("train", False), ("test", True)):
        images, labels = data.split(is_test)
        for name, label in zip(CLASSES, range(10), strict=True):
            for number, image in enumerate(images[labels == label]):
                members[f"{split}/{name}/{number:04}.jpg"] = jpeg(image)
    return members


def write_zip(
    path: Path, members: Iterable[tuple[str, bytes]], packing: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, packing)
