"""The mask commands, on files that other tools would write too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune as torch_prune

from sapwood.pruning import MaskSet
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]


def random_masks(seed: int, share: float = 0.25) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (8, 6), "2.weight": (3, 8)}
    return {name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()}


@pytest.fixture(name="weights")
def random_weights() -> dict[str, Tensor]:
    return {
        "0.weight": torch.randn(8, 6),
        "0.bias": torch.randn(8),
        "2.weight": torch.randn(3, 8),
        "2.bias": torch.zeros(3),
    }


@pytest.fixture(name="checkpoint")
def checkpoint_file(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    save_file(weights, tmp_path / "model.safetensors", metadata={"run": "7"})
    return tmp_path / "model.safetensors"


@pytest.fixture(name="mask_file")
def saved_masks(tmp_path: Path) -> Path:
    path = tmp_path / "a.masks.safetensors"
    MaskSet(random_masks(1), aliases={"head.weight": "2.weight"}).save(path, metadata={"run": "7"})
    return path


def test_inspect_shows_counts(invoke: Invoke, narrow: Narrow, mask_file: Path) -> None:
    result = invoke("mask", "inspect", mask_file)
    assert result.exit_code == 0, result.output
    masks = MaskSet.load(mask_file)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert f"{1 - kept / 72:.2%}" in result.stdout
    assert masks.digest() in result.stdout
    assert "run: 7" in result.stdout
    assert "head.weight is tied to 2.weight" in result.stdout
    assert narrow(result.stdout)


def test_inspect_as_json(invoke: Invoke, mask_file: Path) -> None:
    report = json.loads(invoke("mask", "inspect", mask_file, "--json").stdout)
    kept = int(random_masks(1)["0.weight"].sum())
    assert report["tensors"]["0.weight"] == {"shape": [8, 6], "kept": kept, "total": 48}
    assert report["metadata"] == {"run": "7"}


def test_diff_counts_what_differs(
    invoke: Invoke, narrow: Narrow, tmp_path: Path, mask_file: Path
) -> None:
    other = tmp_path / "b.masks.safetensors"
    MaskSet(random_masks(2)).save(other)
    a, b = random_masks(1)["0.weight"], random_masks(2)["0.weight"]
    report = json.loads(invoke("mask", "diff", mask_file, other, "--json").stdout)
    assert report["tensors"]["0.weight"] == {
        "both": int((a & b).sum()),
        "only_first": int((a & ~b).sum()),
        "only_second": int((b & ~a).sum()),
    }
    assert report["equal"] is False
    result = invoke("mask", "diff", mask_file, other)
    assert f"overlap {report['jaccard']:.3f} (jaccard)" in result.stdout
    assert narrow(result.stdout)


def test_diff_of_equal_files(invoke: Invoke, mask_file: Path) -> None:
    assert "the same masks" in invoke("mask", "diff", mask_file, mask_file).stdout


def test_diff_of_other_models_is_an_error(invoke: Invoke, tmp_path: Path, mask_file: Path) -> None:
    MaskSet({"other": torch.ones(2, dtype=torch.bool)}).save(tmp_path / "b.safetensors")
    result = invoke("mask", "diff", mask_file, tmp_path / "b.safetensors")
    assert result.exit_code == 2
    assert "must have the same names" in result.stderr


def test_apply_sets_zeros_and_keeps_the_rest(
    invoke: Invoke, tmp_path: Path, mask_file: Path, checkpoint: Path, weights: dict[str, Tensor]
) -> None:
    out = tmp_path / "out.safetensors"
    result = invoke("mask", "apply", mask_file, checkpoint, out)
    assert result.exit_code == 0, result.output
    written = load_file(out)
    for name, mask in random_masks(1).items():
        assert torch.equal(written[name], torch.where(mask, weights[name], 0.0))
    assert torch.equal(written["0.bias"], weights["0.bias"])
    removed = sum(int((~mask).sum()) for mask in random_masks(1).values())
    assert f"{removed} weights set to zero" in result.stdout


def test_apply_masks_tied_weights_too(
    invoke: Invoke, tmp_path: Path, mask_file: Path, weights: dict[str, Tensor]
) -> None:
    tied = tmp_path / "tied.safetensors"
    save_file({**weights, "head.weight": weights["2.weight"].clone()}, tied)
    assert invoke("mask", "apply", mask_file, tied, tied).exit_code == 0
    written = load_file(tied)
    assert torch.equal(written["head.weight"], written["2.weight"])


def test_from_zeros_inverts_apply(
    invoke: Invoke, tmp_path: Path, mask_file: Path, checkpoint: Path
) -> None:
    sparse, found = tmp_path / "sparse.safetensors", tmp_path / "found.masks.safetensors"
    assert invoke("mask", "apply", mask_file, checkpoint, sparse).exit_code == 0
    assert invoke("mask", "from-zeros", sparse, found).exit_code == 0
    assert dict(MaskSet.load(found)).keys() == random_masks(1).keys()
    for name, mask in random_masks(1).items():
        assert torch.equal(MaskSet.load(found)[name], mask)


def test_from_zeros_takes_what_include_names(
    invoke: Invoke, tmp_path: Path, checkpoint: Path
) -> None:
    out = tmp_path / "some.masks.safetensors"
    assert invoke("mask", "from-zeros", checkpoint, out, "--include", "2.*").exit_code == 0
    assert list(MaskSet.load(out)) == ["2.weight"]
    result = invoke("mask", "from-zeros", checkpoint, out, "--include", "nothing.*")
    assert result.exit_code == 2
    assert "matches --include 'nothing.*'" in result.stderr


def test_from_zeros_refuses_nan(invoke: Invoke, tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((2, 2), float("nan"))}, tmp_path / "nan.safetensors")
    result = invoke("mask", "from-zeros", tmp_path / "nan.safetensors", tmp_path / "out")
    assert result.exit_code == 2
    assert "a.weight" in result.stderr
    assert "got NaN" in result.stderr
    assert not (tmp_path / "out").exists()


def test_convert_from_torch_prune(invoke: Invoke, tmp_path: Path) -> None:
    layer = torch.nn.Linear(6, 4)
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    save_file(layer.state_dict(), tmp_path / "old.safetensors")
    out = tmp_path / "new.safetensors"
    result = invoke("mask", "convert", "--from", "torch-prune", tmp_path / "old.safetensors", out)
    assert result.exit_code == 0, result.output
    assert torch.equal(load_file(out)["weight"], layer.weight)
    masks = MaskSet.load(tmp_path / "new.masks.safetensors")
    assert torch.equal(masks["weight"], layer.weight_mask.bool())


def test_convert_without_masks_is_an_error(
    invoke: Invoke, tmp_path: Path, checkpoint: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = invoke("mask", "convert", "--from", "torch-prune", checkpoint, out)
    assert result.exit_code == 2
    assert not out.exists()


@pytest.mark.parametrize("position", [0, 7, 60, -1])
def test_truncated_mask_file_is_refused(
    invoke: Invoke, tmp_path: Path, mask_file: Path, checkpoint: Path, position: int
) -> None:
    broken, out = tmp_path / "broken.masks.safetensors", tmp_path / "out.safetensors"
    broken.write_bytes(mask_file.read_bytes()[:position])
    result = invoke("mask", "apply", broken, checkpoint, out)
    assert result.exit_code == 2
    assert "must be an intact mask file" in " ".join(result.stderr.split())
    assert not out.exists()


def test_truncated_checkpoint_is_refused(
    invoke: Invoke, tmp_path: Path, mask_file: Path, checkpoint: Path
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    result = invoke("mask", "apply", mask_file, checkpoint, tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert "must be an intact safetensors file" in " ".join(result.stderr.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_mask_of_another_layer_is_refused(invoke: Invoke, tmp_path: Path, checkpoint: Path) -> None:
    path, out = tmp_path / "wrong.masks.safetensors", tmp_path / "out.safetensors"
    MaskSet({"0.weight": torch.ones(8, 7, dtype=torch.bool)}).save(path)
    result = invoke("mask", "apply", path, checkpoint, out)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert "0.weight must have one shape, got (8, 6) in" in message
    assert "(8, 7) in" in message
    assert not out.exists()


@pytest.mark.parametrize("command", ["inspect", "diff", "apply", "from-zeros"])
def test_missing_file_is_named(invoke: Invoke, tmp_path: Path, command: str) -> None:
    count = {"inspect": 1, "diff": 2, "apply": 3, "from-zeros": 2}[command]
    result = invoke("mask", command, *[tmp_path / "absent.safetensors"] * count)
    assert result.exit_code == 3
    assert "absent.safetensors does not exist" in " ".join(result.stderr.split())
