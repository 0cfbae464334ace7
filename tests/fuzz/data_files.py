"""Intact files of images and data sets."""

from __future__ import annotations

import gzip
import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sapwood.data import mnist
from tests.data.cifar10_files import (
    CLASSES,
    python2_batch,
    python3_batch,
    tiny,
    write_binary,
    write_python,
)


def images() -> list[bytes]:
    pixels = (np.arange(8 * 6 * 3).reshape(8, 6, 3) * 7 % 256).astype(np.uint8)
    found = []
    for kind, mode in (
        *(("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "RGB")),
        *(("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F")),
        *(("WEBP", "RGB"), ("PPM", "RGB"), ("PPM", "L")),
    ):
        picture = Image.fromarray(pixels)
        picture = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        target = io.BytesIO()
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        picture.save(target, kind, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG") else {}))
        found.append(target.getvalue())
    return found


def idx(array: np.ndarray[Any, Any]) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[array.dtype.str[1:]]
    head = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def idx_files() -> list[bytes]:
    arrays = [
        np.arange(24).reshape(2, 3, 4).astype(t) for t in ("u1", "i1", "i2", "i4", "f4", "f8")
    ]
    plain = [idx(a) for a in arrays]
    return [*plain, gzip.compress(plain[0], mtime=0), gzip.compress(plain[4], mtime=0)]


def mnist_folder(folder: Path) -> None:
    for name in mnist.FILES:
        array = np.zeros((3, 4, 4) if "images" in name else 3, np.uint8)
        (folder / name).write_bytes(idx(array))


def mnist_images() -> list[bytes]:
    return [idx(np.arange(48).reshape(3, 4, 4).astype(t)) for t in ("u1", "f4")]


def cifar_folder(version: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        data = tiny(per_file=2, test=2)
        if version == "binary":
            write_binary(folder, data)
        else:
            write_python(folder, data, python2_batch)

    return prepare


def binary_batches() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_binary(Path(folder), tiny(per_file=2, test=1))
        return [
            (Path(folder) / name).read_bytes() for name in ("data_batch_1.bin", "test_batch.bin")
        ]


def python_batches() -> list[bytes]:
    data = tiny(per_file=2, test=1)
    values, labels = data.images[0].reshape(2, -1), data.labels[0]
    writers = (python2_batch, *(python3_batch(protocol) for protocol in (2, 3, 4, 5)))
    return [write(values, labels) for write in (*writers, python3_batch(5, "F"))]


def jpeg_archives() -> list[bytes]:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 90, 200)).save(picture, "JPEG", quality=20)
    found = []
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", packing) as archive:
            for split in ("train", "test"):
                for name in CLASSES:
                    archive.writestr(zipfile.ZipInfo(f"{split}/{name}/1.jpg"), picture.getvalue())
        found.append(target.getvalue())
    return found
