"""Photos as tensors, and tensors as PNG files."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _check
from sapwood._files import atomic_write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = ("L", "RGB", "RGBA")
#: What Pillow may take a file for; some of the others start programs or were never made for photos.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
_MOST_PIXELS = 1 << 26  # of a file; a few bytes can announce as many as they like
_SLACK = 0.01  # how far beyond [0, 1] values may lie
_CHANNELS = 4  # an array whose last size is larger than this holds no image


def as_image(image: object, *, owner: str = "as_image") -> Tensor:
    """Turns what a user holds for an image into a float32 tensor (C, H, W) in [0, 1].

    Example:
        >>> import numpy as np
        >>> from sapwood.gaussian.images import as_image
        >>> as_image(np.zeros((4, 6, 3), np.uint8)).shape
        torch.Size([3, 4, 6])

    Args:
        image: a tensor (C, H, W), floating point in [0, 1] or uint8; a numpy array (H, W, C) or
            (H, W), the same; a PIL image; or the path of a PNG, JPEG, WebP, TIFF, GIF, BMP or PPM
            file. Palettes become RGB.
        owner: the function that the error names.

    Returns:
        (C, H, W) float32, on the device of a tensor, else on the CPU.

    Raises:
        TypeError: for other types, and integers other than uint8.
        ValueError: for other shapes, an empty image, NaN, values outside [-0.01, 1.01], and files
            that are no images, damaged, or of more than 2^26 pixels.
        OSError: when the file cannot be read.
        ModuleNotFoundError: when Pillow is needed and not installed.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(os.fspath(image), owner)
    if isinstance(image, Tensor):
        return _checked(image, owner)
    if isinstance(image, np.ndarray):
        return _checked(_from_numpy(image, owner), owner)
    if not (hasattr(image, "mode") and hasattr(image, "getbands")):
        expected = "be a tensor, a numpy array, a PIL image or a path"
        _check.fail(TypeError, owner, "image", expected, type(image).__name__)
    return _checked(_from_numpy(_pixels(image), owner), owner)


def shrink(image: Tensor, max_side: int) -> Tensor:
    """Reduces an image, smoothed, so that its longer side has at most ``max_side`` pixels.

    Example:
        >>> import torch
        >>> from sapwood.gaussian.images import shrink
        >>> shrink(torch.rand(3, 40, 80), 20).shape
        torch.Size([3, 10, 20])

    Args:
        image: (C, H, W).
        max_side: in pixels, at least 1.

    Returns:
        The image itself where it is small enough, else a smaller one with the same proportions.

    Raises:
        ValueError: when ``max_side`` is not positive.
    """
    if max_side < 1:
        _check.fail(ValueError, "shrink", "max_side", "be at least 1", max_side)
    height, width = image.shape[-2:]
    factor = max_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def write_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Writes an image, clamped and rounded to eight bits, as a PNG file.

    Example:
        >>> import torch
        >>> from sapwood.gaussian.images import as_image, write_png
        >>> write_png("grey.png", torch.full((3, 4, 6), 0.5))
        >>> as_image("grey.png").shape
        torch.Size([3, 4, 6])

    Args:
        path: the file; it is written under a temporary name first.
        image: (C, H, W) with 1, 3 or 4 channels; 4 are written with opacity.

    Raises:
        ValueError: for another shape.
        OSError: when the file cannot be written.
        ModuleNotFoundError: when Pillow is not installed.
    """
    stream = io.BytesIO()
    to_pil(image, owner="write_png").save(stream, format="PNG")
    atomic_write_bytes(path, stream.getvalue())


def to_pil(image: Tensor, *, owner: str = "to_pil") -> Image:
    """A tensor (C, H, W) as a PIL image, clamped and rounded to eight bits."""
    if image.dim() != 3 or image.shape[0] not in (1, 3, 4):
        shape = tuple(image.shape)
        _check.fail(ValueError, owner, "image", "have shape (1 or 3 or 4, H, W)", shape)
    pillow = _pillow(owner)
    levels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).contiguous().numpy()
    return pillow.fromarray(array[..., 0] if image.shape[0] == 1 else array)  # type: ignore[no-any-return]


def _read(path: str, owner: str) -> Tensor:
    pillow = _pillow(owner)
    from PIL import ImageOps

    image = f"sapwood.{owner}: image must be"
    content = io.BytesIO(Path(path).read_bytes())  # errors from here on are those of its content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes: the limit here is lower
            with pillow.open(content, formats=_FORMATS) as opened:
                if opened.width * opened.height > _MOST_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels")
                picture = ImageOps.exif_transpose(opened)  # the way up that the camera noted
                pixels = _pixels(picture)
    except (pillow.UnidentifiedImageError, pillow.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{image} an image file, got {path!r} ({type(error).__name__})") from None
    except OSError as error:
        raise ValueError(f"{image} an undamaged file, got {path!r} ({error})") from None
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{image} an undamaged file of at most {_MOST_PIXELS} pixels, got {path!r} ({reason})"
        ) from None
    return _checked(_from_numpy(pixels, owner), owner)


def _pillow(owner: str) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"sapwood.{owner}: Pillow must be installed for image files, got none: "
            "pip install 'sapwood[tour]'"
        ) from None
    return Image


def _pixels(picture: Any) -> np.ndarray[Any, Any]:
    """(H, W) or (H, W, C), uint8 or float."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return np.asarray(picture, dtype=np.float32) / 65535
    if picture.mode not in _MODES:
        opaque = "transparency" not in picture.info and picture.mode not in ("LA", "PA", "La")
        picture = picture.convert("RGB" if opaque else "RGBA")
    return np.asarray(picture)


def _from_numpy(array: np.ndarray[Any, Any], owner: str) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] > _CHANNELS:
        expected = "have shape (H, W) or (H, W, C) as an array, with at most 4 channels"
        _check.fail(ValueError, owner, "image", expected, array.shape)
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        _check.fail(TypeError, owner, "image", "be floating point or uint8", array.dtype)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())  # PIL's pixels are not writable


def _checked(image: Tensor, owner: str) -> Tensor:
    """float32 in [0, 1], (C, H, W)."""
    if image.dim() != 3 or 0 in image.shape:
        shape = tuple(image.shape)
        _check.fail(ValueError, owner, "image", "have shape (C, H, W), none of them 0", shape)
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        _check.fail(TypeError, owner, "image", "be floating point or uint8", image.dtype)
    image = image.detach().float().contiguous()
    low, high = (float(bound) for bound in image.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN fails too
        _check.fail(ValueError, owner, "image", "lie in [0, 1]", f"[{low:g}, {high:g}]")
    return image
