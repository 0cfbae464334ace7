"""GaussianField: checks, drawing at other sizes, and its file, which takes no damage."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sapwood.gaussian import GaussianField, _field_file, psnr
from sapwood.reference import splat2d as reference


def field(n: int = 30, height: int = 24, width: int = 40, **options: Any) -> GaussianField:
    generator = torch.Generator().manual_seed(0)
    mu = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) - 0.5
    chol = 1 + 2 * torch.rand(n, 3, generator=generator)
    feat = torch.randn(n, 3, generator=generator) / 3
    return GaussianField(mu, chol, feat, height=height, width=width, **options)


def drawn(f: GaussianField, mu: Tensor, chol: Tensor, height: int, width: int) -> Tensor:
    """By the reference, in float64."""
    args = (t.double()[None] for t in (mu, chol, f.feat))
    return reference.splat2d(*args, None, height, width, f.cutoff)[0]


def test_render_is_the_sum_of_gaussians() -> None:
    f = field()
    expected = drawn(f, f.mu, f.chol, 24, 40)
    torch.testing.assert_close(f.render().double(), expected, rtol=0, atol=1e-5)
    assert float(f.render(clamp=True).min()) == 0.0


def test_render_at_another_size_scales_positions_and_shapes() -> None:
    f = field()
    scale = torch.tensor([2.5, 3.0])
    expected = drawn(f, (f.mu + 0.5) * scale - 0.5, f.chol * torch.tensor([2.5, 3.0, 3.0]), 72, 100)
    torch.testing.assert_close(f.render((72, 100)).double(), expected, rtol=0, atol=2e-5)


def test_a_larger_picture_averages_to_the_smaller_one() -> None:
    """Half a pixel of shift would fail this."""
    f = field()
    f.chol[:, ::2] += 1  # no detail below two pixels
    small = torch.nn.functional.avg_pool2d(f.render((48, 80)), 2)
    middle = (small - small.min()) / (small.max() - small.min())
    target = (f.render() - small.min()) / (small.max() - small.min())
    assert float(psnr(middle, target, clamp=False)) >= 40


def test_the_weighted_mean_lies_within_the_colours() -> None:
    f = field(200, mode="norm")
    image = f.render((50, 60))
    assert float(image.max()) <= float(f.feat.max()) + 1e-5
    assert float(image.min()) >= min(0.0, float(f.feat.min())) - 1e-5


def test_gradients_reach_the_tensors() -> None:
    f = field()
    for t in (f.mu, f.chol, f.feat):
        t.requires_grad_()
    f.render((12, 20)).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in (f.mu, f.chol, f.feat))


def test_no_gaussians() -> None:
    f = GaussianField(torch.zeros(0, 2), torch.zeros(0, 3), torch.zeros(0, 1), height=3, width=5)
    assert len(f) == 0
    assert not f.render().any()
    assert f.render().shape == (1, 3, 5)


def test_repr_and_device() -> None:
    f = field()
    assert repr(f) == "GaussianField(30 Gaussians, 3 channels, 24 x 40, mode='sum')"
    moved = f.to("cpu")
    assert torch.equal(moved.render(), f.render())


ROWS = {"mu": torch.zeros(2, 2), "chol": torch.ones(2, 3), "feat": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"mu": [1.0]}, TypeError, "mu must be a tensor, got list"),
        ({"feat": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "feat must be floating point"),
        ({"mu": torch.zeros(2)}, ValueError, "mu must have 2 dimensions, got shape (2,)"),
        ({"mu": torch.zeros(2, 3)}, ValueError, "mu must have shape (2, 2), got (2, 3)"),
        ({"chol": torch.ones(1, 3)}, ValueError, "chol must have shape (2, 3), got (1, 3)"),
        ({"feat": torch.zeros(2, 0)}, ValueError, "feat must have shape (2, 1), got (2, 0)"),
        ({"feat": torch.zeros(2, 3).double()}, RuntimeError, "must have one dtype, got torch.flo"),
        ({"mu": torch.zeros(2, 2).to("meta")}, RuntimeError, "mu is on meta but chol is on cpu"),
        ({"mu": torch.full((2, 2), math.nan)}, ValueError, "mu must be finite, got NaN or inf"),
        ({"chol": torch.zeros(2, 3)}, ValueError, "chol must have positive l1 and l3, got others"),
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": -1}, ValueError, "width must be at least 1, got -1"),
        ({"mode": "max"}, ValueError, "mode must be one of sum, norm, got 'max'"),
        ({"cutoff": math.nan}, ValueError, "cutoff must be positive, got nan"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {**ROWS, "height": 4, "width": 5, **change}
    with pytest.raises(kind) as caught:
        GaussianField(**arguments)
    assert str(caught.value).startswith("sapwood.GaussianField: ")
    assert text in str(caught.value)


def test_a_size_without_pixels_is_refused() -> None:
    text = r"sapwood.GaussianField.render: size must be at least \(1, 1\), got \(0, 4\)"
    with pytest.raises(ValueError, match=text):
        field().render((0, 4))


@pytest.mark.parametrize("mode", ["sum", "norm"])
@pytest.mark.parametrize("cutoff", [9.0, math.inf, 2 * math.log(255)])
def test_save_and_load_are_bitwise(tmp_path: Path, mode: str, cutoff: float) -> None:
    f = field(mode=mode, cutoff=cutoff)
    f.save(tmp_path / "a.safetensors")
    back = GaussianField.load(tmp_path / "a.safetensors")
    assert torch.equal(back.render(), f.render())
    assert torch.equal(back.render((30, 31)), f.render((30, 31)))
    assert (back.mode, back.cutoff) == (mode, cutoff)
    f.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("half", [False, True])
def test_the_library_safetensors_reads_the_file(tmp_path: Path, half: bool) -> None:
    f = field()
    f.save(tmp_path / "a.safetensors", half=half)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
        chol, mu = opened.get_tensor("chol"), opened.get_tensor("mu")
    assert metadata["format"] == "sapwood.gaussian_field"
    assert (metadata["version"], metadata["height"], metadata["width"]) == ("1", "24", "40")
    assert torch.equal(chol, f.chol.half() if half else f.chol)
    assert mu.dtype == (torch.uint16 if half else torch.float32)


def test_half_rounds_little(tmp_path: Path) -> None:
    f = field(400, 300, 500)
    f.save(tmp_path / "a.safetensors", half=True)
    back = GaussianField.load(tmp_path / "a.safetensors")
    assert float((back.mu - f.mu).abs().max()) <= 500 / 65535
    assert (
        back.bits_per_pixel(half=True) == 8 * (tmp_path / "a.safetensors").stat().st_size / 150000
    )
    assert f.bits_per_pixel(half=True) < 0.6 * f.bits_per_pixel()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mu", 1e4, "half must have all centres inside the image, got some outside"),
        ("feat", 1e6, "half must have numbers that float16 holds, got larger or smaller ones"),
        ("chol", 1e-9, "half must have numbers that float16 holds, got larger or smaller ones"),
    ],
)
def test_half_refuses_what_it_cannot_hold(
    tmp_path: Path, name: str, value: float, text: str
) -> None:
    f = field()
    getattr(f, name)[3, 0] = value
    with pytest.raises(ValueError, match=f"sapwood.GaussianField.save: {text}"):
        f.save(tmp_path / "a.safetensors", half=True)
    assert list(tmp_path.iterdir()) == []


def test_an_image_too_large_to_load_is_not_saved(tmp_path: Path) -> None:
    f = GaussianField(**ROWS, height=1 << 15, width=1 << 14)
    with pytest.raises(ValueError, match="the image must have at most 268435456 pixels, got"):
        f.save(tmp_path / "a.safetensors")


def contents() -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
    f = field(3, 4, 5)
    metadata = {
        "format": "sapwood.gaussian_field",
        "version": "1",
        "height": "4",
        "width": "5",
        "mode": "sum",
        "cutoff": "9.0",
    }
    return metadata, {"mu": f.mu.numpy(), "chol": f.chol.numpy(), "feat": f.feat.numpy()}


def test_assembled_contents_are_read() -> None:
    stored = _field_file.decode(_field_file.assemble(*contents()))
    assert (stored.height, stored.width, stored.cutoff) == (4, 5, 9.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "the format must be sapwood.gaussian_field 1, got 'other' '1'"),
        ({"version": "2"}, "the format must be sapwood.gaussian_field 1, got"),
        ({"height": "0"}, "height must be a whole number above 0, got '0'"),
        ({"width": "-5"}, "width must be a whole number above 0, got '-5'"),
        ({"width": "٣"}, "width must be a whole number above 0"),
        ({"width": ""}, "width must be a whole number above 0, got ''"),
        ({"width": "999999999"}, "the image must have at most 268435456 pixels"),
        ({"mode": "max"}, "mode must be sum or norm, got 'max'"),
        ({"cutoff": "nan"}, "cutoff must be a positive number, got 'nan'"),
        ({"cutoff": "-1.0"}, "cutoff must be a positive number, got '-1.0'"),
        ({"cutoff": "9"}, "cutoff must be a positive number, got '9'"),
        ({"more": "x"}, "the metadata must be the texts checksum, cutoff, format"),
        ({"mu": np.full((3, 2), np.nan, "<f4")}, "mu must be finite, got NaN or inf"),
        ({"chol": np.zeros((3, 3), "<f4")}, "chol must have positive l1 and l3, got others"),
        ({"mu": np.zeros((2, 2), "<f4")}, "mu must have N rows, got shape"),
        ({"mu": np.zeros((3, 1), "<f4")}, r"mu, chol, feat must have shapes \(N, 2\)"),
        ({"feat": np.zeros((3, 0), "<f4")}, r"mu, chol, feat must have shapes \(N, 2\)"),
        ({"feat": np.zeros(3, "<f4")}, r"feat must have N rows, got shape \[3\]"),
        ({"feat": np.zeros((3, 3), "<f2")}, "the tensors must be mu, chol and feat, float32 or"),
        ({"sigma": np.zeros((3, 3), "<f4")}, "the tensors must be mu, chol and feat, float32 or"),
    ],
)
def test_wrong_contents_are_refused(change: dict[str, Any], text: str) -> None:
    """With a checksum that matches, so that it is the other checks that speak."""
    metadata, tensors = contents()
    for key, value in change.items():
        (metadata if isinstance(value, str) else tensors)[key] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=text):
        _field_file.decode(_field_file.assemble(metadata, tensors))


@pytest.mark.parametrize("half", [False, True])
def test_every_flipped_bit_is_noticed(half: bool) -> None:
    f = field(3, 4, 5)
    good = f._encoded(half)
    for position in range(8 * len(good)):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):
            _field_file.decode(bytes(bad))


def mutated(good: bytes, rng: random.Random) -> bytes:
    """A file with damage of one of several kinds; half of them with a checksum made to match."""
    content = bytearray(good)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        return bytes(content) + rng.randbytes(rng.randrange(1, 20))
    if kind == 2:
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content)
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), bytearray(good[8 + length :])
    odd = [0, -1, 2**40, 2**63, 1.5, True, None, "x", [], [3], [3, 2], [2**39, 2], {}, "F32", "U16"]
    for _ in range(rng.randrange(1, 3)):
        entry = header[rng.choice(list(header))]
        if isinstance(entry, dict) and entry:
            entry[rng.choice(list(entry))] = rng.choice(odd)
    if body and kind == 5:
        at = rng.randrange(len(body))
        body[at : at + 4] = rng.randbytes(4)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        plain = {k: v for k, v in metadata.items() if k != "checksum"}
        metadata["checksum"] = _field_file._checksum(plain, entries, bytes(body))
    text = _field_file._json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def fuzz(count: int, seed: int) -> None:
    rng = random.Random(seed)
    files = [field(3, 4, 5)._encoded(half) for half in (False, True)]
    accepted = 0
    for _ in range(count):
        try:
            _field_file.decode(mutated(rng.choice(files), rng))
            accepted += 1
        except ValueError:
            pass
    assert accepted < count / 10  # a matching checksum over other numbers is another field


def test_damaged_files_raise_only_value_errors() -> None:
    fuzz(10_000, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files_raise_only_value_errors() -> None:
    fuzz(100_000, seed=1)


def test_load_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"sapwood.GaussianField.load: .*a.safetensors: the file"):
        GaussianField.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        GaussianField.load(tmp_path / "none.safetensors")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match="the file must have at most 1 GiB, got 1073741825 bytes"):
        GaussianField.load(tmp_path / "a.safetensors")
