"""The CIFAR-10 reader trusts nothing: damage, lies and programs in data raise ValueError only."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sapwood.data import _batch_files, _jpeg_archive, _opcodes, load_cifar10
from tests.data import cifar10_files as files

WRITERS = {
    "python2": files.python2_batch,
    **{f"protocol{protocol}": files.python3_batch(protocol) for protocol in (2, 3, 4, 5)},
}


def one_per_file() -> files.Tiny:
    return files.tiny(per_file=1, test=1)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_truncation_of_a_python_batch(writer: Any, tmp_path: Path) -> None:
    data = one_per_file()
    files.write_python(tmp_path, data, writer)
    path = tmp_path / "data_batch_1"
    content = path.read_bytes()
    for length in [*range(0, len(content), 17), *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"load_cifar10: .*_1 must be an intact batch file: "):
            load_cifar10(tmp_path)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_flipped_bytes_of_a_python_batch(writer: Any, tmp_path: Path) -> None:
    """A flipped pixel or label is another pixel or label; anything else is refused."""
    data = one_per_file()
    files.write_python(tmp_path, data, writer)
    path = tmp_path / "data_batch_1"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    reasons: list[str] = []
    outside = [*range(400), *range(len(content) - 100, len(content))]
    for position in [*outside, *random.integers(0, len(content), 100).tolist()]:
        flipped = bytes([content[position] ^ (1 << int(random.integers(8)))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            found = load_cifar10(tmp_path)
        except ValueError as error:
            reasons.append(str(error))
        else:
            assert found.train_inputs.shape == (5, 3072)
            assert set(found.train_labels.tolist()) <= set(range(10))
    assert len(reasons) > 100
    assert all("data_batch_1 must be an intact batch file" in reason for reason in reasons)


EMPTY_ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: object) -> None:
        self.what = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.what


@pytest.mark.parametrize("place", ["whole", "value", "key", "pixels", "list"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_programs_are_refused_and_not_run(protocol: int, place: str, tmp_path: Path) -> None:
    data = one_per_file()
    victim = tmp_path / "ran"
    for attack in (
        Attack(os.system, f"touch {victim}"),
        Attack(Path.touch, victim),
        Attack(eval, f"open({str(victim)!r}, 'w')"),
    ):
        batch: dict[Any, Any] = {"labels": data.labels[0], "data": data.images[0].reshape(1, -1)}
        if place == "value":
            batch["batch_label"] = attack
        elif place == "key":
            batch[attack] = 0
        elif place == "pixels":
            batch["data"] = attack
        elif place == "list":
            batch["labels"] = [attack]
        content = pickle.dumps(attack if place == "whole" else batch, protocol=protocol)
        files.write_python(tmp_path, data, files.python2_batch)
        (tmp_path / "data_batch_2").write_bytes(content)
        with pytest.raises(ValueError, match=r"data_batch_2 must be an intact batch file"):
            load_cifar10(tmp_path)
        assert not victim.exists()


def test_the_attack_is_one(tmp_path: Path) -> None:
    """Whoever unpickles the file of the test above runs the command."""
    victim = tmp_path / "ran"
    pickle.loads(pickle.dumps(Attack(os.system, f"touch {victim}")))  # noqa: S301 - the point
    assert victim.exists()


def pickled(**changes: Any) -> bytes:
    batch = {"labels": [3], "data": np.zeros((1, 3072), np.uint8), **changes}
    return pickle.dumps({k: v for k, v in batch.items() if v is not None}, protocol=4)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "pickle exhausted"),
        (b"hello", "must be an intact batch file"),
        (pickle.dumps({}, protocol=0), "the protocol must be 2 to 5 and stand at the beginning"),
        (b"\x80\x06}.", "the protocol must be 2 to 5, got 6"),
        (b"\x80\x02}\x80\x02.", "the protocol must be 2 to 5 and stand at the beginning"),
        (b"\x80\x02}.more", "must end after 4 bytes, got 8"),
        (b"\x80\x02cos\nsystem\n.", "may name NumPy's arrays only, got 'os system'"),
        (b"\x80\x02G\0\0\0\0\0\0\0\0.", "opcode BINFLOAT has no place in a batch file"),
        (b"\x80\x02(ios\nsystem\n.", "opcode INST has no place in a batch file"),
        (b"\x80\x02)\x81.", "opcode NEWOBJ has no place"),
        (b"\x80\x02U\x01aQ.", "opcode BINPERSID has no place"),
        (b"\x80\x02.", "must hold one dictionary"),
        (b"\x80\x02].", "must hold one dictionary"),
        (b"\x80\x02}}.", "must hold one dictionary"),
        (b"\x80\x02a.", "needs a value, but the stack is empty"),
        (b"\x80\x02}Na.", "needs a list on the stack"),
        (b"\x80\x02e.", "needs a mark, but there is none"),
        (b"\x80\x02}(U\x01au.", "needs a value for every key"),
        (b"\x80\x02}NNs.", "a text must stand where there is a NoneType"),
        (b"\x80\x02h\x05.", "slot 5 of the memory is empty"),
        (b"\x80\x02}N)R.", "a call needs a function and its arguments"),
        (b"\x80\x02cnumpy\ndtype\nU\x02f8\x85R.", "must have the arguments of an array of bytes"),
        (
            b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.",
            "a call .encode. must have the arguments",
        ),
        (b"\x80\x02}Nb.", "what is filled must be an empty array"),
        (EMPTY_ARRAY + b"Nb.", "an empty array must be filled with five values"),
        (pickled(labels=None), "'labels' must be a list of 1 labels"),
        (pickled(labels=[1, 2]), "'labels' must be a list of 1 labels"),
        (pickled(labels=[10]), "all labels must be integers from 0 to 9"),
        (pickled(labels=[-1]), "all labels must be integers from 0 to 9"),
        (pickled(labels=[True]), "all labels must be integers from 0 to 9"),
        (pickled(labels=["3"]), "all labels must be integers from 0 to 9"),
        (pickled(data=None), r"'data' must be an array of bytes \(n, 3072\)"),
        (pickled(data=b"\0" * 3072), r"'data' must be an array of bytes \(n, 3072\)"),
        (pickled(data=np.zeros((1, 3071), np.uint8)), "'data' must be an array of bytes"),
        (pickled(data=np.zeros((0, 3072), np.uint8), labels=[]), "'data' must be an array"),
        (pickled(data=np.zeros(3072, np.uint8)), "must have two sizes whose product is 3072"),
        (pickled(data=np.zeros((1, 3072), np.float32)), "arguments of an array of bytes"),
        (pickled(data=np.zeros((1, 3072), object)), "arguments of an array of bytes"),
    ],
)
def test_what_is_no_batch_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_cifar10(tmp_path)


def test_random_programs_raise_value_errors_only() -> None:
    """Opcodes that are known one by one, thrown together."""
    random = np.random.default_rng(0)
    known = [op for op in pickletools.opcodes if op.name in _opcodes._ACTIONS]
    texts = [b"u1", b"numpy dtype", b"latin1", b"C", b"data", b"_codecs", b"encode"]
    refused = 0
    for _ in range(4000):
        program = b"\x80\x04"
        for op in random.choice(np.array(known, dtype=object), random.integers(1, 25)):
            program += op.code.encode("latin-1")
            if op.name == "GLOBAL":
                program += random.choice([b"numpy\ndtype\n", b"numpy\nndarray\n"])
            elif op.name.startswith("SHORT_BIN"):
                text = texts[random.integers(len(texts))]
                program += bytes([len(text)]) + text
            elif op.arg is not None:
                program += bytes(random.integers(0, 4, max(op.arg.n, 1)).tolist())
        try:
            assert type(_opcodes.read_dictionary(program + b".")) is dict
        except ValueError:
            refused += 1
    assert refused > 3900


def test_endless_programs_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_opcodes, "_MOST_OPCODES", 100)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02" + b"N" * 200 + b".")
    with pytest.raises(ValueError, match="there must be at most 100 opcodes, got more"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("length", [1, 3072, 3074, 2 * 3073 - 1])
def test_truncated_records(length: int, tmp_path: Path) -> None:
    files.write_binary(tmp_path, files.tiny())
    content = (tmp_path / "data_batch_2.bin").read_bytes()
    for rest in (content[:length], b""):
        (tmp_path / "data_batch_2.bin").write_bytes(rest)
        text = f"batch_2.bin must be an intact .*multiple of 3073 bytes, got {len(rest)}"
        with pytest.raises(ValueError, match=text):
            load_cifar10(tmp_path)


def test_wrong_label_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_binary(tmp_path, files.tiny())
    content = (tmp_path / "test_batch.bin").read_bytes()
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + content[1:])
    with pytest.raises(ValueError, match=r"test_batch\.bin .*labels must be below 10, got 10"):
        load_cifar10(tmp_path)
    monkeypatch.setattr(_batch_files, "_MOST_BYTES", 5000)
    with pytest.raises(ValueError, match="the size must be at most 5000 bytes, got 12292"):
        load_cifar10(tmp_path)


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    return files.jpeg_members(files.tiny(per_file=2))


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bytes_of_an_archive(
    packing: int, members: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "a.zip"
    files.write_zip(path, members.items(), packing)
    content = path.read_bytes()
    expected = load_cifar10(path)
    random = np.random.default_rng(0)
    directory = content.index(b"PK\x01\x02")
    positions = random.integers(0, len(content), 60).tolist()
    positions += random.integers(directory, len(content), 300).tolist()
    positions += range(len(content) - 22, len(content))
    reasons: list[str] = []
    for position in positions:
        flipped = bytes([content[position] ^ (1 << int(random.integers(8)))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            found = load_cifar10(path)
        except ValueError as error:
            reasons.append(str(error))
        else:  # a time stamp, or an attribute of a file
            assert found.train_inputs.equal(expected.train_inputs)
            assert found.test_inputs.equal(expected.test_inputs)
    assert len(reasons) > len(positions) // 2
    assert all("a.zip" in reason for reason in reasons)


def test_truncated_archive(members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    files.write_zip(path, members.items())
    content = path.read_bytes()
    for length in [0, 1, *range(30, len(content), 501), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.zip must be an intact zip archive"):
            load_cifar10(path)


def image_bytes(size: tuple[int, int], mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("train/cat/0000.jpg", b"", "'train/cat/0000.jpg' must be an intact JPEG of 32 x 32"),
        ("train/cat/0000.jpg", image_bytes((32, 32), "RGB", "PNG"), "must be an intact JPEG"),
        ("train/cat/0000.jpg", image_bytes((32, 32), "L", "JPEG"), "got 32 x 32 in L"),
        ("test/cat/0000.jpg", image_bytes((33, 32), "RGB", "JPEG"), "got 33 x 32 in RGB"),
        ("test/cat/0000.jpg", b"\0" * 65537, "at most 65536 bytes, got 65537"),
        ("train/cow/0000.jpg", b"", "must hold nothing but .* got 'train/cow/0000.jpg'"),
        ("train/../0000.jpg", b"", r"must hold nothing but .* got 'train/\.\./0000.jpg'"),
        ("../train/cat/0000.jpg", b"", "must hold nothing but"),
        ("/train/cat/0000.jpg", b"", "must hold nothing but"),
        ("train/cat/0000.png", b"", "must hold nothing but"),
        ("readme.txt", b"", "must hold nothing but"),
        ("", b"", "must hold nothing but"),
    ],
)
def test_members_out_of_place(
    name: str, content: bytes, text: str, members: dict[str, bytes], tmp_path: Path
) -> None:
    files.write_zip(tmp_path / "a.zip", {**members, name: content}.items(), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=text):
        load_cifar10(tmp_path / "a.zip")


def test_bombs_are_not_decoded(
    members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = image_bytes((1200, 1200), "RGB", "JPEG")
    assert len(bomb) < 65536
    files.write_zip(tmp_path / "a.zip", {**members, "train/airplane/0000.jpg": bomb}.items())

    def load(image: Image.Image) -> None:
        pytest.fail(f"decoded {image.size}")  # not an Exception: nothing swallows it

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    with pytest.raises(ValueError, match="got 1200 x 1200 in RGB"):
        load_cifar10(tmp_path / "a.zip")


def test_damaged_image_in_an_intact_archive(members: dict[str, bytes], tmp_path: Path) -> None:
    name = "train/ship/0000.jpg"
    for length in range(0, len(members[name]) - 2, 25):
        cut = {**members, name: members[name][:length]}
        files.write_zip(tmp_path / "a.zip", cut.items())
        with pytest.raises(ValueError, match=f"member '{name}' must be an intact JPEG"):
            load_cifar10(tmp_path / "a.zip")


def test_hidden_entries_are_missed(members: dict[str, bytes], tmp_path: Path) -> None:
    """A directory entry whose comment swallows the next one; zipfile sees nothing wrong."""
    path = tmp_path / "a.zip"
    files.write_zip(path, [*members.items(), ("test/truck/0001.jpg", members["test/cat/0000.jpg"])])
    content = bytearray(path.read_bytes())
    last = content.rindex(b"PK\x01\x02")
    before = content.rindex(b"PK\x01\x02", 0, last)
    content[before + 32] = content.rindex(b"PK\x05\x06") - last  # the length of its comment
    path.write_bytes(content)
    assert len(zipfile.ZipFile(path).namelist()) == 20
    with pytest.raises(ValueError, match="must have a directory of 21 entries, got 20"):
        load_cifar10(path)


def test_limits_of_the_archive(
    members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    with pytest.warns(UserWarning, match="Duplicate name"):
        files.write_zip(path, [*members.items(), ("test/cat/0000.jpg", b"")])
    with pytest.raises(ValueError, match="must hold every name once"):
        load_cifar10(path)
    files.write_zip(path, members.items(), zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="must be stored or deflated"):
        load_cifar10(path)
    files.write_zip(path, members.items())
    path.write_bytes(b"before" + path.read_bytes())
    with pytest.raises(ValueError, match="must begin with a member"):
        load_cifar10(path)
    files.write_zip(path, members.items())
    for limit in ("_MOST_IMAGES", "_MOST_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(_jpeg_archive, limit, 19)
            with pytest.raises(ValueError, match=r"must hold at most .* got 20 of"):
                load_cifar10(path)
