"""Photos in, PNG out."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sapwood.gaussian.images import as_image, shrink, write_png
from tests.gaussian.conftest import scene


def pixels(height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    array = pixels()
    expected = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    forms = [array, torch.from_numpy(array).permute(2, 0, 1), picture, tmp_path / "a.png"]
    for form in [*forms, str(tmp_path / "a.png"), array / 255, expected.double()]:
        image = as_image(form)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)
        assert image.dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("RGB", 3), ("RGBA", 4), ("1", 3), ("P", 3), ("CMYK", 3), ("LA", 4), ("YCbCr", 3)],
)
def test_modes_of_files(mode: str, channels: int) -> None:
    image = as_image(Image.fromarray(pixels()).convert(mode))
    assert image.shape == (channels, 4, 6)
    assert 0.3 < float(image[:3].mean()) < 0.7


def test_sixteen_bits(tmp_path: Path) -> None:
    levels = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    torch.testing.assert_close(
        as_image(tmp_path / "a.png"), torch.from_numpy(levels / 65535).float()[None]
    )


def test_the_camera_says_which_way_is_up(tmp_path: Path) -> None:
    picture = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    turned = torch.from_numpy(np.asarray(picture.transpose(Image.Transpose.ROTATE_270)).copy())
    torch.testing.assert_close(as_image(tmp_path / "a.png"), turned.permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_round_trip(tmp_path: Path, channels: int) -> None:
    image = torch.rand(channels, 5, 7)
    write_png(tmp_path / "a.png", image)
    back = as_image(tmp_path / "a.png")
    torch.testing.assert_close(back, image, rtol=0, atol=0.5001 / 255)
    write_png(tmp_path / "b.png", image * 3 - 1)
    torch.testing.assert_close(
        as_image(tmp_path / "b.png"), (image * 3 - 1).clamp(0, 1), atol=0.002, rtol=0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_shrink_averages() -> None:
    image = scene(60, 90)
    small = shrink(image, 30)
    assert small.shape == (3, 20, 30)
    torch.testing.assert_close(small.mean((1, 2)), image.mean((1, 2)), rtol=0, atol=0.01)
    assert shrink(image, 90) is image
    assert shrink(image[:, :1], 9).shape == (3, 1, 9)


@pytest.mark.parametrize(
    ("image", "kind", "text"),
    [
        (3, TypeError, "image must be a tensor, a numpy array, a PIL image or a path, got int"),
        (torch.zeros(3, 4), ValueError, "image must have shape (C, H, W), none of them 0, got"),
        (torch.zeros(3, 0, 4), ValueError, "image must have shape (C, H, W), none of them 0, got"),
        (
            torch.zeros(3, 2, 4, dtype=torch.int64),
            TypeError,
            "image must be floating point or uint8",
        ),
        (torch.full((3, 2, 4), 255.0), ValueError, "image must lie in [0, 1], got [255, 255]"),
        (torch.full((3, 2, 4), -0.1), ValueError, "image must lie in [0, 1], got [-0.1, -0.1]"),
        (torch.full((3, 2, 4), torch.nan), ValueError, "image must lie in [0, 1], got [nan,"),
        (np.zeros((3, 4, 5)), ValueError, "image must have shape (H, W) or (H, W, C) as an array"),
        (
            np.zeros((4, 5), dtype=int),
            TypeError,
            "image must be floating point or uint8, got int64",
        ),
        (np.zeros(4), ValueError, "image must have shape (H, W) or (H, W, C) as an array"),
    ],
)
def test_what_is_no_image(image: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        as_image(image, owner="fit_image")
    assert str(caught.value).startswith(f"sapwood.fit_image: {text}")


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match=r"image must be an image file, got '.*a.png' \(Unident"):
        as_image(tmp_path / "a.png")
    write_png(tmp_path / "b.png", torch.rand(3, 50, 50))
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "c.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"image must be an undamaged file, got '.*c.png' \("):
        as_image(tmp_path / "c.png")
    (tmp_path / "d.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"image must be an image file"):  # it would be a program
        as_image(tmp_path / "d.eps")
    Image.new("L", (9, 9)).save(tmp_path / "e.gif")
    content = (tmp_path / "e.gif").read_bytes()
    (tmp_path / "e.gif").write_bytes(content[:6] + 2 * b"\1\x20" + content[10:])
    with pytest.raises(ValueError, match=r"at most 67108864 pixels, got .* \(8193 x 8193 pixels\)"):
        as_image(tmp_path / "e.gif")
    with pytest.raises(FileNotFoundError):
        as_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        as_image(tmp_path)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    text = r"sapwood.as_image: Pillow must be installed for image files, got none: pip install"
    with pytest.raises(ModuleNotFoundError, match=text):
        as_image("a.png")
    assert as_image(pixels()).shape == (3, 4, 6)


def test_write_and_shrink_errors(tmp_path: Path) -> None:
    text = r"sapwood.write_png: image must have shape \(1 or 3 or 4, H, W\), got \(2, 4, 5\)"
    with pytest.raises(ValueError, match=text):
        write_png(tmp_path / "a.png", torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"sapwood.shrink: max_side must be at least 1, got 0"):
        shrink(torch.zeros(3, 4, 5), 0)
