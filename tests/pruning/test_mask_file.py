"""The mask file: round trips, other readers, and every kind of damage."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood.pruning import Linear, MaskSet, Pruner, _container, _maskfile


def sample() -> MaskSet:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "b.weight": (7, 3),
        "a.weight": (2, 2, 3, 3),
        "scalar": (),
        "none": (0, 4),
        "row": (16,),
    }
    masks = {n: torch.rand(shape, generator=generator) < 0.4 for n, shape in shapes.items()}
    return MaskSet(masks, aliases={"tied.weight": "b.weight"})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.masks.safetensors"
    masks = sample()
    masks.save(path, metadata={"run": "sieben, 7 µm"})
    loaded = MaskSet.load(path)
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert loaded.digest() == masks.digest()
    assert loaded.aliases == masks.aliases
    assert loaded.metadata == {"run": "sieben, 7 µm"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    sample().save(tmp_path / "a")
    sample().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    sample().save(tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    assert set(tensors) == set(sample())
    bits = np.unpackbits(tensors["b.weight"].numpy(), bitorder="little")[:21]
    assert np.array_equal(bits.astype(bool), sample()["b.weight"].flatten().numpy())


def test_a_transposed_mask_is_stored_in_logical_order(tmp_path: Path) -> None:
    mask = (torch.arange(12).reshape(3, 4) % 5 == 0).t()
    MaskSet({"w": mask}).save(tmp_path / "m")
    assert torch.equal(MaskSet.load(tmp_path / "m")["w"], mask)


def flip(content: bytes, position: int, pattern: int) -> bytes:
    return content[:position] + bytes([content[position] ^ pattern]) + content[position + 1 :]


def damaged(content: bytes) -> list[bytes]:
    """Ten thousand ways to be broken: cut anywhere, each byte altered in many ways, lying sizes."""
    rng = np.random.default_rng(0)
    cases = [content[:n] for n in range(len(content))]
    for position in range(len(content)):
        patterns = {1 << bit for bit in range(8)} | set(rng.integers(1, 256, 6).tolist())
        cases += [flip(content, position, pattern) for pattern in patterns]
    cases += [content + bytes(n) for n in (1, 7, 8, 64)]
    body = content[8:]
    lengths = [0, 1, 7, len(body), len(body) + 1, 2**31, 2**32 + 8, 2**62, 2**63, 2**64 - 1]
    return cases + [length.to_bytes(8, "little") + body for length in lengths]


def is_refused(content: bytes) -> bool:
    try:
        _maskfile.decode(content)
    except ValueError:
        return True
    return False


def test_every_damage_is_a_value_error() -> None:
    content = _maskfile.encode(sample(), sample().aliases, {"run": "1"})
    cases = damaged(content)
    assert len(cases) >= 10_000
    assert [number for number, case in enumerate(cases) if not is_refused(case)] == []
    assert not is_refused(content)


@pytest.mark.parametrize("position", [3, 40, -1], ids=["length", "header", "data"])
def test_a_damaged_file_names_itself(tmp_path: Path, position: int) -> None:
    path = tmp_path / "m.masks.safetensors"
    sample().save(path)
    content = path.read_bytes()
    path.write_bytes(flip(content, position % len(content), 16))
    with pytest.raises(
        ValueError, match=r"MaskSet\.load: .*m\.masks\.safetensors must be an intact"
    ):
        MaskSet.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="must be an intact mask file"):
        MaskSet.load(path)


def reencoded(**changes: str) -> bytes:
    """A file with a valid checksum and other metadata."""
    packed, metadata = _container.decode(_maskfile.encode(sample(), {}, {}))
    return _container.encode(packed, {**metadata, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "sapwood.mask/2"}, "format must be 'sapwood.mask/1', got 'sapwood.mask/2'"),
        ({"shapes": "{}"}, "shapes must name exactly the masks"),
        ({"shapes": "nonsense"}, "shapes must be a JSON object"),
        ({"aliases": "[]"}, "aliases must be a JSON object"),
        ({"digest": "0" * 64}, "digest must match"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_content_under_a_right_checksum(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _maskfile.decode(reencoded(**changes))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([7, 4], r"mask b\.weight must hold 4 bytes for shape \(7, 4\), got 3"),
        ([7, -3], "must be a list of sizes"),
        ([7, 3.0], "must be a list of sizes"),
        ([17], r"must have zero padding bits"),
    ],
)
def test_wrong_shapes(shape: list[int], text: str) -> None:
    packed, metadata = _container.decode(
        _maskfile.encode(MaskSet({"b.weight": torch.ones(7, 3).bool()}), {}, {})
    )
    content = _container.encode(packed, {**metadata, "shapes": json.dumps({"b.weight": shape})})
    with pytest.raises(ValueError, match=text):
        _maskfile.decode(content)


def test_files_of_another_kind(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("not a mask file at all")
    Pruner(torch.nn.Linear(3, 3), Linear(0.5, t1=2, every=1)).save(tmp_path / "pruner")
    for name in ("weights", "text", "pruner"):
        with pytest.raises(ValueError, match="must be an intact mask file"):
            MaskSet.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        MaskSet.load(tmp_path / "missing")


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    sample().save(path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        MaskSet({"w": torch.ones(9).bool()}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_large_masks_are_quick_and_small(tmp_path: Path) -> None:
    masks = MaskSet({f"l{i}": torch.rand(1_250_000) < 0.1 for i in range(8)})
    path = tmp_path / "m"
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        masks.save(path)
        loaded = MaskSet.load(path)
        best = min(best, time.perf_counter() - started)
    assert loaded == masks
    assert path.stat().st_size <= 1_260_000 + 65_536
    assert best <= 0.5
