"""Chapter 4: a photo as a sum of 2D Gaussians, drawn again at any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sapwood.cli.chapters import ChapterResult, Context
from sapwood.cli.fit_image import demo_photo
from sapwood.gaussian import FitProgress, FitResult, fit_image
from sapwood.gaussian.images import to_pil
from sapwood.report import plots
from sapwood.report.page import Chapter, Figure, Section, Stat, Table

TITLE = "A photo as Gaussians"
SIDE, STEPS = 256, 1500
QUICK_SIDE, QUICK_STEPS = 192, 400
PARTS = (4, 2, 1)  # of the default number of Gaussians
_ZOOM, _CUT = 6, 40  # enlargement of a detail, and its side in pixels
_ELLIPSES = 400  # drawn as outlines


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    photo: Tensor  # (3, H, W)
    fits: Sequence[FitResult]  # from few Gaussians to many
    steps: int

    @property
    def best(self) -> FitResult:
        return self.fits[-1]


def run(context: Context) -> ChapterResult:
    """Fits scikit-learn's photo of a temple with three numbers of Gaussians; some seconds."""
    m = _measure(context)
    n, psnr = len(m.best.field), m.best.psnr
    height, width = m.photo.shape[1:]
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_pictures(m), _numbers(m)]),
        headline=f"Drew a photo with {n} Gaussians to {psnr:.1f} dB in {m.best.seconds:.1f} s.",
        stats=[Stat(f"{psnr:.1f} dB", f"PSNR of {n} Gaussians for {height * width} pixels")],
        summary=_table(m),
        remarks=[_remark(m)],
        facts=[("Photo", f"scikit-learn's china.jpg, {width} x {height} pixels, {m.steps} steps")],
        data=_data(m),
    )


def _measure(context: Context) -> Measured:
    photo = demo_photo(QUICK_SIDE if context.quick else SIDE)
    steps = QUICK_STEPS if context.quick else STEPS
    full = photo.shape[1] * photo.shape[2] // 13
    fits = []
    context.bars.start("a photo as Gaussians")
    for part in PARTS:

        def show(now: FitProgress) -> None:
            context.bars.step(now.step, now.steps, f"{now.psnr:.2f} dB, {now.n} Gaussians")

        fits.append(fit_image(photo, full // part, steps=steps, seed=context.seed, callback=show))
    return Measured(photo, fits, steps)


def _lead(m: Measured) -> str:
    return (
        "A few thousand blurred spots, each with a place, a shape and a colour, add up to a photo. "
        "Gradient descent through the op splat2d finds them; the picture can then be drawn at any "
        "size, because spots have no pixels."
    )


def _pictures(m: Measured) -> Section:
    best = m.best
    few = m.fits[0]
    return Section(
        "From few spots to many",
        [
            f"The photo, and what {len(few.field)} and {len(best.field)} Gaussians make of it. "
            f"The outlines are those of {len(_chosen(len(few.field)))} of the {len(few.field)}, at "
            "one standard deviation."
        ],
        [
            Figure(_images_svg(m), "Each picture is drawn by splat2d."),
            Figure(
                _detail_svg(m),
                f"A detail, {_ZOOM} times as large: pixels, and Gaussians drawn at that size.",
            ),
        ],
    )


def _numbers(m: Measured) -> Section:
    return Section("What it costs", [_remark(m)], [_table(m)])


def _images_svg(m: Measured) -> str:
    height, width = m.photo.shape[1:]
    titles = ["Photo", *(f"{len(f.field)} Gaussians" for f in (m.fits[0], m.best)), "Their shapes"]
    pictures = [m.photo, m.fits[0].field.render(clamp=True), m.best.field.render(clamp=True)]
    with plots.style():
        figure, axes = plots.panels(4, height=10.0 / 4 * height / width + 0.35)
        for ax, title in zip(axes, titles, strict=True):
            ax.set(title=title, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            _bare(ax)
        for ax, picture in zip(axes, pictures, strict=False):
            ax.imshow(to_pil(picture), interpolation="nearest")
        _outline(axes[3], m.fits[0])
        return plots.svg(figure, "a photo, two sums of Gaussians, and the outlines of some of them")


def _outline(ax: Any, fit: FitResult) -> None:
    """One standard deviation of some Gaussians, in a neutral colour."""
    from matplotlib.patches import Ellipse

    field = fit.field
    for index in _chosen(len(field)):
        (x, y), (l1, l2, l3) = field.mu[index].tolist(), field.chol[index].tolist()
        xx, xy, yy = l1 * l1, l1 * l2, l2 * l2 + l3 * l3
        middle, spread = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
        axes = (2 * math.sqrt(middle + spread), 2 * math.sqrt(max(middle - spread, 0)))
        angle = math.degrees(0.5 * math.atan2(2 * xy, xx - yy))
        ax.add_patch(
            Ellipse((x, y), *axes, angle=angle, fill=False, color=plots.SERIES[1], linewidth=0.5)
        )
    ax.set_aspect("equal")


def _chosen(n: int) -> list[int]:
    """Which of n Gaussians are outlined: all, or some of them, evenly."""
    count = min(n, _ELLIPSES)
    return [index * n // count for index in range(count)]


def _detail_svg(m: Measured) -> str:
    height, width = m.photo.shape[1:]
    top, left = (height - _CUT) // 2, (width - _CUT) // 2
    large = m.best.field.render((_ZOOM * height, _ZOOM * width), clamp=True)
    rows = slice(_ZOOM * top, _ZOOM * (top + _CUT))
    columns = slice(_ZOOM * left, _ZOOM * (left + _CUT))
    pieces = {
        "Photo": m.photo[:, top : top + _CUT, left : left + _CUT],
        f"{len(m.best.field)} Gaussians": large[:, rows, columns],
    }
    with plots.style():
        figure, axes = plots.panels(2, width=6.4, height=3.5)
        for ax, (title, picture) in zip(axes, pieces.items(), strict=True):
            ax.imshow(to_pil(picture), interpolation="nearest")
            ax.set_title(title)
            _bare(ax)
        return plots.svg(figure, "a detail of the photo in pixels and as Gaussians, enlarged")


def _bare(ax: Any) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _table(m: Measured) -> Table:
    rows = [
        [
            str(len(fit.field)),
            f"{fit.psnr:.2f} dB",
            f"{fit.ssim:.4f}",
            f"{fit.field.bits_per_pixel(half=True):.2f}",
            f"{fit.seconds:.1f} s",
        ]
        for fit in m.fits
    ]
    return Table(["Gaussians", "PSNR", "SSIM", "bits per pixel", "time"], rows)


def _remark(m: Measured) -> str:
    return (
        f"{m.steps} steps each. The bits are those of the 16-bit file, in which nothing is entropy "
        "coded; it is no rival of JPEG."
    )


def _data(m: Measured) -> dict[str, Any]:
    return {
        "size": list(m.photo.shape[1:]),
        "steps": m.steps,
        "fits": [
            {
                "gaussians": len(fit.field),
                "psnr": fit.psnr,
                "ssim": fit.ssim,
                "bits_per_pixel_half": fit.field.bits_per_pixel(half=True),
                "seconds": fit.seconds,
            }
            for fit in m.fits
        ],
    }
