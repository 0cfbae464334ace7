"""``sapwood fit-image``: a photo as 2D Gaussians, in a small file that is drawn at any size."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapwood.cli import console

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sapwood.gaussian import FitProgress, FitResult, GaussianField

EPILOG = (
    "Without INPUT it takes scikit-learn's china.jpg. Beside OUT it writes the drawn picture, "
    "OUT-render.png, and photo, picture and error side by side, OUT-compare.png. Ctrl-C ends the "
    "fit and keeps what there is."
)
SCHEMA = "sapwood.fit_image/1"
_LARGEST_SIDE = 16384  # of a drawn picture
_DEMO_SIDE = 256


#: How Gaussians become an image, how their number grows, and what is made small. Their members'
#: names are free of those that ``str`` has.
Mode = Enum("Mode", {"SUM": "sum", "NORM": "norm"}, type=str)
Densify = Enum("Densify", {"ERROR": "error", "SPLIT": "split", "NONE": "none"}, type=str)
Loss = Enum("Loss", {"MSE": "mse", "L1SSIM": "l1ssim"}, type=str)


def fit_image(
    photo: Annotated[
        Path | None, typer.Argument(metavar="INPUT", help="An image file.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The field. Default: INPUT's name, .safetensors."),
    ] = None,
    gaussians: Annotated[
        int | None, typer.Option(help="How many. Default: one per 13 pixels.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(help="Of Adam.", min=1)] = 1500,
    mode: Annotated[Mode, typer.Option(help="Sum, or weighted mean.")] = Mode.SUM,
    densify: Annotated[
        Densify, typer.Option(help="Grow by error, by splitting, or not.")
    ] = Densify.ERROR,
    loss: Annotated[Loss, typer.Option(help="Squared error, or L1 and SSIM.")] = Loss.MSE,
    max_side: Annotated[int, typer.Option(help="Larger photos are reduced.", min=1)] = 512,
    half: Annotated[bool, typer.Option("--half", help="16-bit file of half the size.")] = False,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which to stop.", min=0.0)
    ] = None,
    target_psnr: Annotated[float | None, typer.Option(help="Quality at which to stop, dB.")] = None,
    seed: Annotated[int, typer.Option(help="Of the positions.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    render: Annotated[
        Path | None, typer.Option(help="Where to draw the picture. Default: beside OUT.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of that picture, WxH.")] = None,
    render_only: Annotated[
        Path | None, typer.Option(help="Draw this field; fit nothing. Needs --render.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a photo into 2D Gaussians, and draw them at any size."""
    pixels = _parsed(size)
    console.require("fit-image", {"PIL": "pillow"})
    console.require_ops()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    place = _device(device)
    if render_only is not None:
        _render_only(photo, render_only, render, pixels, place, as_json)
        return
    source, name, target = _photo(photo, max_side)
    files = _files(out, name, render)
    if photo is not None and photo.resolve() in [file.resolve() for file in files.values()]:
        raise typer.BadParameter(f"{photo} would be overwritten: give another --out or --render")
    options = {
        "steps": steps,
        "mode": mode.value,
        "densify": densify.value,
        "loss": loss.value,
        "seed": seed,
        "time_limit": time_limit,
        "target_psnr": target_psnr,
    }
    with console.reported(files["field"]):
        result = _fit(target, gaussians, {**options, "device": place})
        report = _write(files, result, target, half, pixels)
    report = {"schema": SCHEMA, "input": source, "size": list(target.shape[1:]), **report}
    report["options"] = {"gaussians": gaussians, **options, "device": str(place), "half": half}
    report["files"] = {kind: str(file) for kind, file in files.items()}
    _show(report, as_json)
    if report["stopped"] == "callback":
        raise typer.Exit(console.INTERRUPTED)


def _parsed(size: str | None) -> tuple[int, int] | None:
    """(H, W) out of WxH."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= width <= _LARGEST_SIDE and 1 <= height <= _LARGEST_SIDE):
        raise typer.BadParameter(
            f"--size must be WxH with sides of 1 to {_LARGEST_SIDE}, got {size}"
        )
    return height, width


def _device(name: str) -> torch.device:
    import torch

    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"--device must be auto, cpu or cuda, got {name}")
    if name != "cpu" and not cuda:
        raise typer.BadParameter(f"--device {name}: torch sees no CUDA device here")
    return torch.device(name)


def _photo(photo: Path | None, max_side: int) -> tuple[str, str, Tensor]:
    """What to call the input in a report and in file names, and its pixels."""
    from sapwood.gaussian import images

    if photo is None:
        console.require("fit-image without INPUT", {"sklearn": "scikit-learn"})
        return "scikit-learn's china.jpg", "china", demo_photo(min(max_side, _DEMO_SIDE))
    with console.reported(photo):
        target = images.as_image(photo, owner="fit_image")
    return str(photo), photo.stem, images.shrink(target, max_side)


def demo_photo(max_side: int) -> Tensor:
    """The photo that comes with scikit-learn, reduced: (3, H, W)."""
    from sklearn.datasets import load_sample_image

    from sapwood.gaussian import images

    return images.shrink(images.as_image(load_sample_image("china.jpg")), max_side)


def _files(out: Path | None, name: str, render: Path | None) -> dict[str, Path]:
    """Where results go; what cannot be written is refused before the work begins."""
    field = Path(f"{name}.safetensors") if out is None else out
    if field.suffix != ".safetensors":
        field = field.with_name(field.name + ".safetensors")
    files = {
        "field": field,
        "picture": field.with_name(f"{field.stem}-render.png") if render is None else render,
        "compare": field.with_name(f"{field.stem}-compare.png"),
    }
    for file in files.values():
        _check_place(file)
    return files


def _check_place(file: Path) -> None:
    if not file.parent.is_dir():
        raise typer.BadParameter(f"the folder of {file} does not exist")
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder")


def _fit(target: Tensor, gaussians: int | None, options: dict[str, Any]) -> FitResult:
    from sapwood.cli.interrupt import Interrupts
    from sapwood.gaussian import fit_image

    with console.bars() as bars, Interrupts(bars.say) as interrupts:
        bars.start("fit")
        return fit_image(target, gaussians, callback=_on(bars, interrupts.asked), **options)


def _on(bars: console.Bars, asked: Callable[[], bool]) -> Callable[[FitProgress], bool]:
    def show(now: FitProgress) -> bool:
        bars.step(now.step, now.steps, f"{now.psnr:.2f} dB, {now.n} Gaussians")
        return asked()

    return show


def _write(
    files: dict[str, Path],
    result: FitResult,
    target: Tensor,
    half: bool,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Writes the three files; returns what is to be said about them."""
    from sapwood._files import atomic_write_bytes
    from sapwood.cli.side_by_side import side_by_side
    from sapwood.gaussian import GaussianField, images, psnr

    result.field.save(files["field"], half=half)
    stored = GaussianField.load(files["field"])
    picture = stored.render(clamp=True)
    images.write_png(files["picture"], picture if size is None else stored.render(size))
    quality = float(psnr(picture, target))
    caption = f"{len(stored)} Gaussians, {quality:.2f} dB"
    atomic_write_bytes(files["compare"], side_by_side(target, picture, caption))
    return {
        "gaussians": len(stored),
        "steps": result.history[-1]["step"],
        "psnr": result.psnr,
        "psnr_of_file": quality,
        "ssim": result.ssim if result.ssim == result.ssim else None,
        "bits_per_pixel": stored.bits_per_pixel(half=half),
        "seconds": result.seconds,
        "stopped": result.history[-1]["stopped"],
    }


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(report)
        return
    height, width = report["size"]
    similar = "none below 11 x 11 pixels" if report["ssim"] is None else f"{report['ssim']:.4f}"
    loss = report["psnr"] - report["psnr_of_file"]
    stored = f", {loss:.2f} dB lost by --half" if report["options"]["half"] else ""
    rows = [
        ("image", f"{width} x {height} pixels of {Path(report['input']).name}"),
        ("Gaussians", str(report["gaussians"])),
        ("steps", f"{report['steps']} in {report['seconds']:.1f} s{_why(report['stopped'])}"),
        ("PSNR", f"{report['psnr']:.2f} dB{stored}"),
        ("SSIM", similar),
        ("file", f"{report['bits_per_pixel']:.2f} bits per pixel, not entropy coded"),
    ]
    out = console.stdout()
    for name, value in rows:
        out.print(f"{name:<10} {value}", markup=False, soft_wrap=True)
    wrote = ", ".join(report["files"].values())
    out.print(f"wrote {wrote}", markup=False, soft_wrap=True)


def _why(stopped: str) -> str:
    reasons = {
        "time_limit": ", stopped by --time-limit",
        "target_psnr": ", stopped at --target-psnr",
        "callback": ", interrupted",
    }
    return reasons.get(stopped, "")


def _render_only(
    photo: Path | None,
    source: Path,
    render: Path | None,
    size: tuple[int, int] | None,
    device: torch.device,
    as_json: bool,
) -> None:
    from sapwood.gaussian import GaussianField, images

    if photo is not None:
        raise typer.BadParameter("--render-only FIELD takes no INPUT")
    if render is None:
        raise typer.BadParameter("--render-only needs --render PNG")
    _check_place(render)
    with console.reported(source):
        field: GaussianField = GaussianField.load(source)
        shown = (field.height, field.width) if size is None else size
        if max(shown) > _LARGEST_SIDE:
            raise typer.BadParameter(f"{source} is {shown[1]}x{shown[0]}: give a smaller --size")
        images.write_png(render, field.to(device).render(shown))
    if as_json:
        report = {"schema": SCHEMA, "field": str(source), "gaussians": len(field)}
        console.print_json({**report, "size": list(shown), "files": {"picture": str(render)}})
        return
    line = f"drew {len(field)} Gaussians at {shown[1]} x {shown[0]}: wrote {render}"
    console.stdout().print(line, markup=False, soft_wrap=True)
