"""The CIFAR-10 reader: every form gives the same data, and says what is missing."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sapwood.data import Dataset, MissingDataError, load_cifar10, load_digits
from tests.data import cifar10_files as files

MEAN = np.array([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
DEVIATION = np.array([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)


def pixels(inputs: torch.Tensor) -> NDArray[np.float64]:
    """Standardised inputs (n, 3072) back to pixels (n, 3, 32, 32)."""
    images = inputs.double().numpy().reshape(-1, 3, 32, 32)
    return np.asarray(images * DEVIATION + MEAN) * 255.0


def assert_holds(found: Dataset, data: files.Tiny) -> None:
    """The data set has exactly the images of the files, in their order."""
    for inputs, labels, is_test in (
        (found.train_inputs, found.train_labels, False),
        (found.test_inputs, found.test_labels, True),
    ):
        images, expected = data.split(is_test)
        assert inputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.tolist() == expected.tolist()
        np.testing.assert_allclose(pixels(inputs), images, rtol=0, atol=1e-4)
    assert found.classes == 10
    assert found.features == 3072
    assert found.image_shape == (3, 32, 32)


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_binary_version(subfolder: str, tmp_path: Path) -> None:
    data = files.tiny()
    (tmp_path / subfolder).mkdir(exist_ok=True)
    files.write_binary(tmp_path / subfolder, data)
    found = load_cifar10(tmp_path)
    assert_holds(found, data)
    assert found.source == "CIFAR-10, binary version, 20 + 10 images"


def test_python2_writer_writes_what_python_reads() -> None:
    """The writer of these tests, checked by the real thing."""
    data = files.tiny(per_file=300)
    values = data.images[0].reshape(300, -1)
    content = files.python2_batch(values, data.labels[0])
    read = pickle.loads(content, encoding="bytes")  # noqa: S301 - written two lines above
    assert np.array_equal(read[b"data"], values)
    assert read[b"labels"] == data.labels[0]
    assert len(read[b"filenames"]) == 300


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_python2_version(subfolder: str, tmp_path: Path) -> None:
    data = files.tiny()
    (tmp_path / subfolder).mkdir(exist_ok=True)
    files.write_python(tmp_path / subfolder, data, files.python2_batch)
    found = load_cifar10(tmp_path)
    assert_holds(found, data)
    assert found.source == "CIFAR-10, Python version, 20 + 10 images"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python3_version(protocol: int, order: str, tmp_path: Path) -> None:
    data = files.tiny()
    files.write_python(tmp_path, data, files.python3_batch(protocol, order))
    assert_holds(load_cifar10(tmp_path), data)


def test_old_numpy_names(tmp_path: Path) -> None:
    """NumPy 1 called its modules numpy.core, NumPy 2 calls them numpy._core."""
    data = files.tiny()

    def encode(values: NDArray[np.uint8], labels: list[int]) -> bytes:
        content = files.python3_batch(2)(values, labels)
        return content.replace(b"numpy._core", b"numpy.core")

    files.write_python(tmp_path, data, encode)
    assert b"numpy._core" not in (tmp_path / "data_batch_1").read_bytes()
    assert_holds(load_cifar10(tmp_path), data)


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("as_folder", [False, True])
def test_jpeg_archive(as_folder: bool, packing: int, tmp_path: Path) -> None:
    data = files.tiny()
    members = [("train/", b""), *sorted(files.jpeg_members(data).items(), reverse=True)]
    path = tmp_path / "cifar10_jpeg.zip"
    files.write_zip(path, members, packing)
    found = load_cifar10(tmp_path if as_folder else path)
    for inputs, labels, is_test in (
        (found.train_inputs, found.train_labels, False),
        (found.test_inputs, found.test_labels, True),
    ):
        images, expected = data.split(is_test)
        order = np.argsort(expected, kind="stable")  # the archive is sorted by class
        assert labels.tolist() == expected[order].tolist()
        error = np.abs(pixels(inputs) - images[order])
        assert error.max() < 6.0  # of 255; what the best quality of JPEG costs at sharp colours
        assert error.mean() < 1.0
    assert found.source == "CIFAR-10, lossy JPEG copies, 20 + 10 images"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10_jpeg.zip"]


def test_per_class_takes_the_first(tmp_path: Path) -> None:
    data = files.tiny(per_file=13)
    files.write_binary(tmp_path, data)
    images, labels = data.split(test=False)
    seen: Counter[int] = Counter()
    expected = []
    for row, label in enumerate(labels.tolist()):
        seen[label] += 1
        if seen[label] <= 3:
            expected.append(row)
    found = load_cifar10(tmp_path, per_class=3)
    assert found.train_labels.tolist() == labels[expected].tolist()
    np.testing.assert_allclose(pixels(found.train_inputs), images[expected], rtol=0, atol=1e-4)
    assert len(found.test_labels) == 10


def test_per_class_of_an_archive(tmp_path: Path) -> None:
    members = files.jpeg_members(files.tiny())
    members["train/cat/0001.jpg"] = b"not even an image"
    files.write_zip(tmp_path / "a.zip", members.items())
    found = load_cifar10(tmp_path / "a.zip", per_class=1)  # what is not taken is not decoded
    assert found.train_labels.tolist() == list(range(10))


@pytest.mark.parametrize("form", ["binary", "archive"])
def test_per_class_is_checked(form: str, tmp_path: Path) -> None:
    data = files.tiny()
    path = tmp_path
    if form == "binary":
        files.write_binary(path, data)
    else:
        path = tmp_path / "a.zip"
        files.write_zip(path, files.jpeg_members(data).items())
    text = "load_cifar10: per_class must be at most 2, the number of training images of class"
    with pytest.raises(ValueError, match=f"{text} 'airplane', got 3"):
        load_cifar10(path, per_class=3)
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        load_cifar10(path, per_class=0)
    for wrong in (1.0, True, "1"):
        with pytest.raises(TypeError, match="per_class must be an integer or None"):
            load_cifar10(path, per_class=wrong)  # type: ignore[arg-type]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"load_cifar10: .*nowhere does not exist"):
        load_cifar10(tmp_path / "nowhere")
    with pytest.raises(MissingDataError, match=r"data_batch_1\.bin does not exist, nor does"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize("ending", ["", ".bin"])
def test_a_missing_batch_is_named(name: str, ending: str, tmp_path: Path) -> None:
    if ending:
        files.write_binary(tmp_path, files.tiny())
    else:
        files.write_python(tmp_path, files.tiny(), files.python2_batch)
    (tmp_path / f"{name}{ending}").unlink()
    with pytest.raises(MissingDataError, match=rf"{name}{ending} does not exist$"):
        load_cifar10(tmp_path)


def test_a_missing_class_is_named(tmp_path: Path) -> None:
    members = files.jpeg_members(files.tiny())
    kept = [(name, content) for name, content in members.items() if "test/frog" not in name]
    files.write_zip(tmp_path / "a.zip", kept)
    with pytest.raises(MissingDataError, match=r"a\.zip: test/frog/\*\.jpg does not exist in it"):
        load_cifar10(tmp_path / "a.zip")


def test_pillow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_zip(tmp_path / "a.zip", files.jpeg_members(files.tiny()).items())
    files.write_binary(tmp_path, files.tiny())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"Pillow must .*pip install 'sapwood\[tour\]'"):
        load_cifar10(tmp_path / "a.zip")
    assert len(load_cifar10(tmp_path).train_labels) == 20  # batch files need none


def test_images_are_views() -> None:
    digits = load_digits()
    assert digits.image_shape == (1, 8, 8)
    assert digits.train_images.shape == (len(digits.train_labels), 1, 8, 8)
    assert digits.test_images.data_ptr() == digits.test_inputs.data_ptr()
    rows, labels = torch.zeros(2, 3), torch.zeros(2).long()
    flat = Dataset("rows", "", rows, labels, rows, labels, classes=2)
    with pytest.raises(ValueError, match="image_shape must be three sizes for images, got None"):
        _ = flat.train_images


def test_the_real_archive(shared_data: Path) -> None:
    path = shared_data / "cifar10_jpeg.zip"
    with zipfile.ZipFile(path) as archive:
        counts = Counter(name.split("/")[0] for name in archive.namelist())
    assert counts == {"train": 50_000, "test": 10_000}
    data = load_cifar10(path, per_class=50)
    assert data.train_labels.bincount().tolist() == [50] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    # 10 000 images, standardised by the known figures of all: mean 0 and deviation 1
    assert data.test_images.mean((0, 2, 3)).abs().max() < 0.03
    assert (data.test_images.std((0, 2, 3)) - 1).abs().max() < 0.02
