"""The CIFAR-10 example: augmentation, all methods on tiny data, resuming, its command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.data import Dataset, load_cifar10
from sapwood.pruning import MaskSet, Progress, TrainConfig
from tests.data import cifar10_files as files

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cifar10.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training images and 20 test images in the binary version."""
    found = tmp_path_factory.mktemp("cifar-10")
    files.write_binary(found, files.tiny(per_file=20, test=20))
    return found


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return load_cifar10(folder)


def moved(image: Tensor, down: int, right: int, mirrored: bool, padding: int) -> Tensor:
    """One image (c, h, w), cut out of its padded self."""
    c, h, w = image.shape
    padded = torch.zeros(c, h + 2 * padding, w + 2 * padding)
    padded[:, padding : padding + h, padding : padding + w] = image
    cut = padded[:, down : down + h, right : right + w]
    return cut.flip(2) if mirrored else cut


def test_crops_are_cut_out_of_padded_images(example: ModuleType) -> None:
    images = torch.randn(400, 3, 6, 5)
    found = example.crop_and_flip(images, torch.Generator().manual_seed(0), padding=2)
    assert found.shape == images.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    ways = [(d, r, m) for d in range(5) for r in range(5) for m in (False, True)]
    seen = []
    for image, result in zip(images, found, strict=True):
        fitting = [way for way in ways if torch.equal(moved(image, *way, padding=2), result)]
        assert len(fitting) == 1
        seen += fitting
    assert set(seen) == set(ways)  # 400 images, 50 ways
    assert 160 < sum(mirrored for _, _, mirrored in seen) < 240


def test_crops_depend_on_the_generator_alone(example: ModuleType) -> None:
    images = torch.randn(8, 3, 32, 32)
    state = torch.get_rng_state()
    first, same, other = (
        example.crop_and_flip(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    flat = images.contiguous(memory_format=torch.channels_last)
    again = example.crop_and_flip(flat, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)


def test_batches(example: ModuleType) -> None:
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 8, 8)
    cpu = torch.device("cpu")
    plain = example.Batches(images, torch.arange(10), 4, cpu, augment=False)
    assert len(plain) == 3
    found = list(plain)
    assert torch.equal(torch.cat([x for x, _ in found]), images)
    assert [len(y) for _, y in found] == [4, 4, 2]
    assert torch.cat([y for _, y in found]).tolist() == list(range(10))
    for augment in (False, True):
        x, _ = next(iter(example.Batches(images, torch.arange(10), 4, cpu, augment=augment)))
        assert x.is_contiguous(memory_format=torch.channels_last)

    shuffled = example.Batches(images, torch.arange(10), 4, cpu, augment=True)
    torch.manual_seed(0)
    first, second = list(shuffled), list(shuffled)
    for epoch in (first, second):
        x, y = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert sorted(y.tolist()) == list(range(10))
        assert y.tolist() != list(range(10))
        assert torch.equal(x.amax((1, 2, 3)), y.float())  # image and label stay together
    assert not torch.equal(first[0][1], second[0][1])
    torch.manual_seed(0)
    iterator = iter(shuffled)
    x, _ = next(iterator)
    assert torch.equal(x, first[0][0])
    torch.manual_seed(99)  # whatever happens to the generator meanwhile, the epoch is decided
    assert torch.equal(next(iterator)[0], first[1][0])


def run_main(example: ModuleType, folder: Path, out: Path, *more: str) -> int:
    few = ["--epochs", "2", "--batch-size", "32", "--threads", "1", "--device", "cpu"]
    code: int = example.main(["--data", str(folder), "--out", str(out), *few, *more])
    return code


def test_all_methods_end_exactly_sparse(
    example: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    out = tmp_path / "runs.json"
    methods = [name for name in example.METHODS if name != "lottery"]
    more = ["--arch", "small_cnn", "--epochs", "1", "--sparsity", "0.9", "--method", *methods]
    assert run_main(example, folder, out, *more) == 0
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == methods
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(methods)
    assert not any("NO" in line for line in table)
    for row in rows:
        assert row["history"][-1]["metric"] == row["accuracy"] / 100
        assert row["data"] == "CIFAR-10, binary version, 100 + 20 images"
        assert row["training"]["weight_decay"] == 5e-4
        assert row["steps"] == (8 if row["method"] == "finetune" else 4)
        if row["method"] == "dense":
            assert "zeros" not in row
            continue
        saved = tmp_path / "runs.checkpoints" / f"small_cnn-{row['method']}-0"
        masks = MaskSet.load(saved / "model.masks.safetensors")
        assert masks.digest() == row["masks_digest"]
        off = sum(int((~mask).sum()) for mask in masks.values())
        assert off == row["zeros"] == row["zeros_expected"] == round(0.9 * 24_112)
        assert row["masks_and_weights_agree"]


def test_lottery_tickets(example: ModuleType, folder: Path, tmp_path: Path, threads: None) -> None:
    out = tmp_path / "runs.json"
    more = ["--arch", "small_cnn", "--sparsity", "0.3", "--method", "lottery", "--seed", "3"]
    assert run_main(example, folder, out, *more) == 0
    (row,) = json.loads(out.read_text())
    assert row["steps"] == 3 * 8  # dense, 20 %, 30 %
    assert len(row["history"]) == 6
    assert row["zeros"] == round(0.3 * 24_112)


def test_resnet20_in_bf16(example: ModuleType, folder: Path, tmp_path: Path, threads: None) -> None:
    out = tmp_path / "runs.json"
    more = ["--arch", "resnet20", "--epochs", "1", "--amp", "bf16", "--limit", "40"]
    assert run_main(example, folder, out, *more) == 0
    (row,) = json.loads(out.read_text())
    assert row["method"] == "progressive"
    assert row["sparsity"] == 0.95
    assert row["zeros"] == row["zeros_expected"] == round(0.95 * 268_336)
    assert row["parameters"] == 269_722
    assert row["steps"] == 2
    assert row["data"] == "CIFAR-10, binary version, 40 + 20 images"


def test_a_random_control_copies_budgets(
    example: ModuleType, folder: Path, tmp_path: Path, threads: None
) -> None:
    more = ["--arch", "small_cnn", "--sparsity", "0.9", "--method"]
    assert run_main(example, folder, tmp_path / "snip.json", *more, "snip") == 0
    snip = tmp_path / "snip.checkpoints" / "small_cnn-snip-0" / "model.masks.safetensors"
    out = tmp_path / "random.json"
    assert run_main(example, folder, out, *more, "random", "--like", str(snip)) == 0
    control = tmp_path / "random.checkpoints" / "small_cnn-random-0" / "model.masks.safetensors"
    wanted, found = MaskSet.load(snip), MaskSet.load(control)
    assert found.counts() == wanted.counts()
    assert found.digest() != wanted.digest()


class Stop(Exception):
    """The end of an interrupted run."""


@pytest.mark.parametrize("method", ["progressive", "snip"])
def test_resuming_is_exact(method: str, example: ModuleType, data: Dataset, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, a run goes on with the same crops of the same images."""
    config = TrainConfig(epochs=2, batch_size=32, device="cpu")

    def run(**options: Any) -> dict[str, Tensor]:
        _, result = example.run(data, "small_cnn", method, 0.9, config, **options)
        state: dict[str, Tensor] = result.model.state_dict()
        return state

    def stop(now: Progress) -> None:
        if now.step == 6:  # of 2 x 4
            raise Stop

    expected = run(progress=None)
    with pytest.raises(Stop):
        run(progress=stop, checkpoint=tmp_path)
    found = run(progress=None, checkpoint=tmp_path, resume=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_run_is_not_repeated(
    example: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    out = tmp_path / "runs.json"
    more = ["--arch", "small_cnn", "--sparsity", "0.9"]
    assert run_main(example, folder, out, *more) == 0
    first = json.loads(out.read_text())
    assert run_main(example, folder, out, *more) == 2
    assert "resume=True" in capsys.readouterr().err
    assert run_main(example, folder, out, *more, "--resume") == 0
    assert json.loads(out.read_text()) == first
    assert "epoch" not in capsys.readouterr().err
    assert run_main(example, folder, out, *more, "--resume", "--lr", "0.2") == 2
    assert "must be of the same run" in capsys.readouterr().err


def test_sparsities_of_the_tables(
    example: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def run(data: Dataset, arch: str, method: str, sparsity: float, *rest: Any, **more: Any) -> Any:
        asked[arch] = sparsity, rest[0]
        raise ValueError("enough")

    monkeypatch.setattr(example, "run", run)
    for arch in ("resnet18", "vgg_like", "vgg19", "resnet20"):
        arguments = ["--data", str(folder), "--arch", arch, "--out", str(tmp_path / "a.json")]
        assert example.main(arguments) == 2
    assert {arch: sparsity for arch, (sparsity, _) in asked.items()} == {
        "resnet18": 0.729,
        "vgg_like": 0.97,
        "vgg19": 0.9797,
        "resnet20": 0.95,
    }
    config = asked["resnet18"][1]
    assert (config.epochs, config.lr, config.batch_size) == (160, 0.1, 128)
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 5e-4)
    assert config.scheduler == "cosine"


def test_what_is_wrong_is_named(
    example: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    assert run_main(example, tmp_path, out) == 3
    assert "data_batch_1.bin does not exist" in capsys.readouterr().err
    for limit in ("15", "0"):
        assert run_main(example, folder, out, "--limit", limit) == 2
        assert f"positive multiple of 10, got {limit}" in capsys.readouterr().err
    assert run_main(example, folder, out, "--arch", "small_cnn", "--sparsity", "1.5") == 2
    assert "sparsity must" in capsys.readouterr().err
    assert run_main(example, folder, out, "--like", str(tmp_path / "nothing")) == 3
    assert not out.exists()


def test_an_interruption_says_how_to_go_on(
    example: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(F, "cross_entropy", interrupt)
    assert run_main(example, folder, tmp_path / "runs.json", "--arch", "small_cnn") == 130
    assert "--resume goes on" in capsys.readouterr().err
