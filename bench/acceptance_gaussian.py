"""The promises of image fitting: target, measured, PASS or MISS.

    python bench/acceptance_gaussian.py PHOTOS [--only gates growth ...] [--photo kodim23 ...]
        [--seeds 0 1 2] [--threads 1] [--json FILE]

PHOTOS is a folder of Kodak photos, 768 x 512, as kodimNN.png. Crops are the central 256 x 256
pixels. PSNR is of the clamped image, without rounding to eight bits; seconds are wall time of the
whole fit. ``growth`` and ``full`` run on every photo that ``--photo`` names, the others on kodim23.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from points import Point, report
from torch import Tensor

from sapwood._measure import interleave
from sapwood.gaussian import FitResult, GaussianField, fit_image, fit_images, psnr
from sapwood.gaussian._optimise import Optimiser
from sapwood.gaussian._settings import Settings
from sapwood.gaussian.images import as_image
from sapwood.ops import splat2d, splat2d_backward

PHOTOS = ("kodim01", "kodim05", "kodim13", "kodim15", "kodim20", "kodim23")
CROP = 256


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    folder: Path
    photos: Sequence[str]
    seeds: Sequence[int]

    def photo(self, name: str = "kodim23") -> Tensor:
        return as_image(self.folder / f"{name}.png")

    def crop(self, name: str = "kodim23") -> Tensor:
        image = self.photo(name)
        top, left = (image.shape[1] - CROP) // 2, (image.shape[2] - CROP) // 2
        return image[:, top : top + CROP, left : left + CROP].contiguous()


def figure(
    name: str, measured: float, target: float | None = None, *, unit: str = "dB", **more: Any
) -> Point:
    """A figure, judged if it has a target."""
    return Point(name, target, measured, unit=unit, **more)


def told(result: FitResult) -> str:
    return f"{len(result.field)} Gaussians, SSIM {result.ssim:.4f}, {result.seconds:.1f} s"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gates(request: Request) -> Iterator[Point]:
    """PSNR by number and by steps, all from the start."""
    crop = request.crop()
    for n, target in ((1000, None), (2500, 36.0), (5000, 40.0), (10_000, None)):
        result = fit_image(crop, n, steps=1000, densify="none")
        yield figure(f"kodim23, {n} Gaussians, 1000 steps", result.psnr, target, note=told(result))
    for steps in (250, 500):
        result = fit_image(crop, 5000, steps=steps, densify="none")
        yield figure(f"kodim23, 5000 Gaussians, {steps} steps", result.psnr, note=told(result))
    result = fit_image(request.crop("kodim05"), 2500, steps=1000, densify="none")
    yield figure("kodim05, 2500 Gaussians, 1000 steps", result.psnr, note=told(result))


def init(request: Request) -> Iterator[Point]:
    """Positions by gradient against uniform ones."""
    crop, means = request.crop(), {}
    for name in ("gradient", "uniform"):
        options: dict[str, Any] = {"steps": 1000, "densify": "none", "init": name}
        values = [fit_image(crop, 5000, seed=s, **options).psnr for s in request.seeds]
        means[name] = mean(values)
        note = ", ".join(f"{value:.2f}" for value in values)
        yield figure(f"kodim23, 5000 Gaussians, init {name}", means[name], note=note)
    yield figure("gradient over uniform", means["gradient"] - means["uniform"], 2.0)


def growth(request: Request) -> Iterator[Point]:
    """Densification at equal final number and steps."""
    for photo in request.photos:
        crop, means = request.crop(photo), {}
        for name in ("none", "error", "split"):
            results = [
                fit_image(crop, 2500, steps=1500, densify=name, seed=s) for s in request.seeds
            ]
            means[name] = mean([r.psnr for r in results])
            fewest = min(len(r.field) for r in results)
            note = f"SSIM {mean([r.ssim for r in results]):.4f}, at least {fewest} Gaussians, "
            note += ", ".join(f"{r.psnr:.2f}" for r in results)
            yield figure(f"{photo}, 2500 Gaussians, densify {name}", means[name], note=note)
        for name in ("error", "split"):
            target = -0.2 if photo in ("kodim23", "kodim05") else None
            yield figure(f"{photo}, {name} over none", means[name] - means["none"], target)


def full(request: Request) -> Iterator[Point]:
    """Whole photos, 10 000 Gaussians."""
    for photo in request.photos:
        result = fit_image(request.photo(photo), 10_000, steps=3000)
        yield figure(f"{photo}, 768 x 512, 10000 Gaussians", result.psnr, note=told(result))
        yield figure(f"{photo}, seconds", result.seconds, unit="s")


def events(request: Request) -> Iterator[Point]:
    """What growing does to the picture at the step itself, and 30 steps on."""
    for densify in ("split", "error"):
        for mode in ("sum", "norm"):
            worst, late = _events(request.crop(), densify, mode)
            name = f"kodim23, {densify}, {mode}"
            target = -1.0 if densify == "split" else None
            yield figure(f"{name}: worst change at an event", worst, target)
            yield figure(
                f"{name}: steps to be better again, worst", late, 30, unit="", at_least=False
            )


@torch.no_grad()
def _events(crop: Tensor, densify: str, mode: str) -> tuple[float, float]:
    optimiser = Optimiser(crop[None], _settings(densify=densify, steps=1500, mode=mode))
    quality: list[float] = []
    events: dict[int, float] = {}
    for step in range(1100):  # beyond the last event
        before = optimiser.draw()
        quality.append(float(psnr(before, optimiser.images)))
        counts = list(optimiser.parameters.counts)
        optimiser.densify(step)
        image = optimiser.draw()
        if counts != optimiser.parameters.counts:
            events[step] = float(psnr(image, optimiser.images)) - quality[-1]
        optimiser.descend(step, image)
    back = [
        next((k for k in range(1, 50) if quality[step + k] > quality[step]), 50) for step in events
    ]
    return min(events.values()), float(max(back))


def _settings(**changes: Any) -> Settings:
    known: dict[str, Any] = {
        "n_gaussians": 2500,
        "steps": 1000,
        "mode": "sum",
        "init": "gradient",
        "densify": "none",
        "loss": "mse",
        "lr_pos": 0.15,
        "lr_chol": 0.05,
        "lr_feat": 0.01,
        "sigma_min": 0.3,
        "seed": 0,
        "time_limit": None,
        "target_psnr": None,
    }
    return Settings(**{**known, **changes})


def batch(request: Request) -> Iterator[Point]:
    """Eight crops of 128 x 128 at once and one by one."""
    photo = request.photo()
    crops = [photo[:, y : y + 128, x : x + 128] for y in (0, 256) for x in (0, 160, 320, 480)]
    start = time.perf_counter()
    together = fit_images(crops, 1200, steps=500)
    at_once = time.perf_counter() - start
    start = time.perf_counter()
    alone = [fit_image(crop, 1200, steps=500) for crop in crops]
    one_by_one = time.perf_counter() - start
    apart = max(abs(a.psnr - b.psnr) for a, b in zip(together, alone, strict=True))
    yield figure("8 crops at once: largest difference", apart, 0.05, at_least=False)
    note = f"{at_once:.1f} s against {one_by_one:.1f} s"
    yield figure(
        "time at once / one by one", at_once / one_by_one, 1.0, unit="x", note=note, at_least=False
    )


def files(request: Request) -> Iterator[Point]:
    """A 16-bit file of a fit of about 40 dB."""
    crop = request.crop()
    result = fit_image(crop, 5000, steps=700, densify="none")
    with tempfile.TemporaryDirectory() as folder:
        result.field.save(Path(folder) / "a.safetensors", half=True)
        stored = GaussianField.load(Path(folder) / "a.safetensors")
    lost = result.psnr - float(psnr(stored.render(), crop))
    note = f"at {result.psnr:.2f} dB; {stored.bits_per_pixel(half=True):.2f} bits per pixel"
    yield figure("lost by half=True", lost, 0.3, note=note, at_least=False)
    yield figure("bits per pixel, float32", stored.bits_per_pixel(), unit="")


@torch.no_grad()
def step(request: Request) -> Iterator[Point]:
    """A step against its two kernels, 256 x 256, 2500 Gaussians."""
    optimiser = Optimiser(request.crop()[None], _settings())
    for k in range(30):
        optimiser.descend(k, optimiser.draw())
    p, size = optimiser.parameters, (CROP, CROP)
    scene = (p.mu.clone(), p.chol.clone(), p.feat.clone())
    image = splat2d(*scene, size)
    gradient = (image - optimiser.images) / image.numel()
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: optimiser.descend(30, optimiser.draw()),
        "forward": lambda: splat2d(*scene, size, validate=False),
        "backward": lambda: splat2d_backward(gradient, *scene, validate=False),
    }
    times = {name: min(t) for name, t in interleave(calls, rounds=30, seconds=1.0).items()}
    note = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items())
    ratio = times["step"] / (times["forward"] + times["backward"])
    yield figure("step / (forward + backward)", ratio, 1.6, unit="x", note=note, at_least=False)


PARTS = {f.__name__: f for f in (gates, init, growth, full, events, batch, files, step)}


def main() -> int:
    """Runs what is asked for; prints a line per point, and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="PHOTOS")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photo", nargs="+", default=list(PHOTOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    request = Request(arguments.folder, arguments.photo, arguments.seeds)
    points = chain.from_iterable(PARTS[name](request) for name in arguments.only)
    return 1 if report(points, arguments.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
