"""A photo, what became of it, and the difference, as one PNG."""

from __future__ import annotations

import io

from torch import Tensor

from sapwood.gaussian.images import to_pil

ERROR_GAIN = 8
_GAP, _PAPER, _INK = 8, (255, 255, 255), (34, 38, 31)


def side_by_side(
    photo: Tensor,  # (C, H, W)
    picture: Tensor,  # (C, H, W)
    caption: str,
) -> bytes:
    """The bytes of a PNG: photo, picture under its caption, and the absolute error, magnified.

    Stacked instead where the image is so wide that three of them make a strip; small images are
    enlarged without smoothing, so that captions fit and pixels can be seen.
    """
    from PIL import Image, ImageDraw, ImageFont

    error = (photo - picture).abs() * ERROR_GAIN
    error = error[:3] if error.shape[0] == 4 else error  # opacity would hide the error
    panels = [to_pil(panel).convert("RGB") for panel in (photo, picture, error)]
    titles = ["photo", caption, f"|error| x {ERROR_GAIN}"]
    zoom = max(1, 240 // panels[0].width)
    width, height = (side * zoom for side in panels[0].size)
    font = ImageFont.load_default(size=13)
    text = 22
    along = (0, height + text + _GAP) if width > 2 * height else (width + _GAP, 0)
    total = (2 * along[0] + width + 2 * _GAP, 2 * along[1] + height + text + 2 * _GAP)
    sheet = Image.new("RGB", total, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        x, y = _GAP + index * along[0], _GAP + index * along[1]
        draw.text((x, y), title, fill=_INK, font=font)
        sheet.paste(panel.resize((width, height), Image.Resampling.NEAREST), (x, y + text))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return stream.getvalue()
