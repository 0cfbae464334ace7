"""``sapwood prune`` from data to files, on a task small enough to run in seconds."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sapwood.cli import experiment, tasks
from sapwood.pruning import MaskSet
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]


@pytest.fixture(autouse=True)
def _small_digits(small_digits: None) -> None:
    """Every run here takes moments."""


def write_idx(path: Path, values: torch.Tensor) -> None:
    """An idx file of unsigned bytes, gzipped."""
    head = struct.pack(">BBBB", 0, 0, 8, values.dim()) + struct.pack(
        f">{values.dim()}I", *values.shape
    )
    path.write_bytes(gzip.compress(head + bytes(values.to(torch.uint8).flatten().tolist())))


@pytest.fixture(name="mnist")
def small_mnist(tmp_path: Path) -> Path:
    """A data set in MNIST's files: the label is the brightest of ten columns."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 600), ("t10k", 100)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28))
        images[torch.arange(count), :, labels] = 250
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.parametrize(
    "method", ["progressive", "cubic", "one-shot", "finetune", "lth", "snip", "grasp", "random"]
)
def test_files_agree_with_each_other(
    invoke: Invoke, narrow: Narrow, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    result = invoke("prune", "--method", method, "--sparsity", "0.8", "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == [
        "masks.safetensors",
        "model.safetensors",
        "report.json",
        "sparsity.csv",
        "sparsity.svg",
    ]
    masks, weights = MaskSet.load(out / "masks.safetensors"), load_file(out / "model.safetensors")
    prunable = 64 * 32 + 32 * 32 + 32 * 10
    assert sum(kept for kept, _ in masks.counts().values()) == prunable - round(0.8 * prunable)
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
    report = json.loads((out / "report.json").read_text())
    assert report["masks_digest"] == masks.digest()
    assert report["sparsity"] == pytest.approx(0.8, abs=1 / prunable)
    assert report["accuracy"] == pytest.approx(1 - report["wrong"] / 360)
    assert report["zeros"] == report["zeros_expected"] == round(0.8 * prunable)
    assert report["masks_and_weights_agree"]
    assert report["left_zero_after_last_update"] in (0, None if method == "one-shot" else 0)
    rows = list(csv.DictReader((out / "sparsity.csv").read_text().splitlines()))
    assert [(row["name"], int(row["kept"])) for row in rows] == [
        (name, kept) for name, (kept, _) in masks.counts().items()
    ]
    for name, (kept, total) in masks.counts().items():
        assert name in result.stdout
        assert f"{kept:,} of {total:,}</text>" in (out / "sparsity.svg").read_text()
    assert report["packed"]["max_difference"] < 1e-4
    assert [timing["batch"] for timing in report["packed"]["timings"]] == [1, 64, 256]
    assert f"({report['wrong']} wrong)" in result.stdout
    head, _, wrote = result.stdout.rpartition("wrote ")
    assert str(out) in wrote
    assert narrow(head)


def test_dense_writes_no_masks_and_packs_nothing(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("prune", "--method", "dense", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert "packed" not in report
    assert report["sparsity"] == 0
    assert not (tmp_path / "out" / "masks.safetensors").exists()


def test_without_matplotlib_the_drawing_is_missed(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without_matplotlib(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    result = invoke("prune", "--epochs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "sparsity.svg is missing: it needs matplotlib, pip install 'sapwood[tour]'" in (
        " ".join(result.stdout.split())
    )
    assert not (tmp_path / "sparsity.svg").exists()
    assert (tmp_path / "sparsity.csv").exists()


def test_one_shot_only_cuts(invoke: Invoke, tmp_path: Path) -> None:
    arguments = ["--sparsity", "0.5", "--epochs", "1", "--json"]
    dense = invoke("prune", "--method", "dense", *arguments, "--out", tmp_path / "dense")
    cut = invoke("prune", "--method", "one-shot", *arguments, "--out", tmp_path / "cut")
    assert dense.exit_code == cut.exit_code == 0
    before = load_file(tmp_path / "dense" / "model.safetensors")
    after = load_file(tmp_path / "cut" / "model.safetensors")
    masks = MaskSet.load(tmp_path / "cut" / "masks.safetensors")
    for name, mask in masks.items():
        assert torch.equal(after[name], torch.where(mask, before[name], 0.0))


def test_seed_decides_the_outcome(invoke: Invoke, tmp_path: Path) -> None:
    digests = []
    for run, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(run)
        arguments = ["--epochs", "1", "--seed", seed, "--out", out, "--json"]
        report = json.loads(invoke("prune", *arguments).stdout)
        digests.append(report["masks_digest"])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_mnist_files_are_read(invoke: Invoke, tmp_path: Path, mnist: Path) -> None:
    out = tmp_path / "out"
    result = invoke("prune", "--data", mnist, "--epochs", "3", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["task"] == "mnist"
    assert report["arch"] == "lenet300"
    assert report["parameters"] == 266_610
    assert report["accuracy"] > 0.9


@pytest.fixture(name="cifar10")
def small_cifar10(tmp_path: Path) -> Path:
    """CIFAR-10's binary files with twenty images each: the label is the brightness."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = torch.arange(20) % 10
        pixels = torch.randint(0, 20, (20, 3072)) + 23 * labels[:, None]
        rows = torch.cat((labels[:, None], pixels), dim=1).to(torch.uint8)
        (folder / f"{name}.bin").write_bytes(rows.numpy().tobytes())
    return folder


@pytest.mark.parametrize(("arch", "layers"), [("smallcnn", 4), ("resnet20", 20)])
def test_cifar10_files_are_read(
    invoke: Invoke, narrow: Narrow, tmp_path: Path, cifar10: Path, arch: str, layers: int
) -> None:
    out = tmp_path / "out"
    options = ["--task", "cifar10", "--data", cifar10, "--arch", arch, "--epochs", "2"]
    result = invoke("prune", *options, "--limit", "50", "--every", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert "no layer is packed: sapwood packs linear layers, where that is faster" in result.stdout
    assert narrow(result.stdout.rpartition("wrote ")[0])
    report = json.loads((out / "report.json").read_text())
    assert len(report["sparsity_report"]["tensors"]) == layers
    assert report["steps"] == 2  # 50 images fit into one batch
    assert report["zeros"] == report["zeros_expected"]
    assert report["packed"]["timings"] == []


@pytest.mark.parametrize(
    ("limit", "message"),
    [("15", "--limit must be a multiple of the 10 classes, got 15"), ("200", "must be ")],
)
def test_an_impossible_limit_is_refused(
    invoke: Invoke, tmp_path: Path, cifar10: Path, limit: str, message: str
) -> None:
    options = ["--task", "cifar10", "--data", cifar10, "--limit", limit]
    result = invoke("prune", *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_limit_takes_the_same_number_of_each_class(invoke: Invoke, tmp_path: Path) -> None:
    dataset = tasks.read("digits", None, 70)
    assert dataset.train_labels.bincount().tolist() == [7] * 10
    whole = tasks.read("digits", None)
    first = [int((whole.train_labels == label).nonzero()[0]) for label in range(10)]
    limited = tasks.read("digits", None, 10)
    assert torch.equal(limited.train_inputs, whole.train_inputs[sorted(first)])
    result = invoke("prune", "--limit", "1430", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--limit must be at most 1390: there are 139 training images of class 8" in (
        " ".join(result.stderr.split())
    )


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_data_is_named(invoke: Invoke, tmp_path: Path, mnist: Path, name: str) -> None:
    (mnist / f"{name}.gz").unlink()
    result = invoke("prune", "--data", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert f"{name}.gz does not exist" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_damaged_data_is_refused(invoke: Invoke, tmp_path: Path, mnist: Path) -> None:
    file = mnist / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    result = invoke("prune", "--data", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "train-labels-idx1-ubyte.gz" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_labels_of_other_images_are_refused(invoke: Invoke, tmp_path: Path, mnist: Path) -> None:
    write_idx(mnist / "train-labels-idx1-ubyte.gz", torch.zeros(599))
    result = invoke("prune", "--data", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "got (600, 28, 28) and (599,)" in " ".join(result.stderr.split())


def test_interrupt_before_training_leaves_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "network", interrupted)
    result = invoke("prune", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_interrupt_while_saving_keeps_old_results(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "atomic_write_text", interrupted)  # the last of three files
        result = invoke("prune", "--epochs", "1", "--out", out)
    assert result.exit_code == 130
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint", "report.json"]
    assert (out / "report.json").read_text() == "old"
    result = invoke("prune", "--epochs", "1", "--out", out, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "report.json").read_text()) == json.loads(result.stdout)
    assert not (out / "checkpoint").exists()


def test_unwritable_folder_is_one_line(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("prune", "--epochs", "1", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.output
