"""sapwood fit-image: what it writes and prints, and how it fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sapwood.gaussian
from sapwood.cli import fit_image as command
from sapwood.gaussian import GaussianField, psnr
from sapwood.gaussian.images import as_image, write_png
from tests.cli.conftest import Invoke
from tests.gaussian.conftest import scene

Narrow = Callable[[str], bool]
QUICK = ("--steps", "40", "--gaussians", "60", "--threads", "1")


@pytest.fixture(name="photo")
def small_photo(tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture of 48 x 40 pixels in the present folder."""
    monkeypatch.chdir(tmp_path)
    write_png("photo.png", scene(40, 48))
    return Path("photo.png")


def test_three_files_and_a_summary(invoke: Invoke, photo: Path, narrow: Narrow) -> None:
    result = invoke("fit-image", photo, *QUICK)
    assert result.exit_code == 0, result.output
    field = GaussianField.load("photo.safetensors")
    assert len(field) == 60
    picture = as_image("photo-compare.png")
    assert picture.shape[0] == 3
    assert picture.shape[2] > 3 * 240
    drawn = as_image("photo-render.png")
    torch.testing.assert_close(drawn, field.render(clamp=True), rtol=0, atol=0.003)
    assert narrow(result.stdout)
    for word in ("48 x 40 pixels of photo.png", "PSNR", "SSIM", "bits per pixel", "40 in"):
        assert word in result.stdout
    value = float(psnr(field.render(), as_image(photo)))
    assert f"{value:.2f} dB" in result.stdout


def test_json_is_one_object(invoke: Invoke, photo: Path) -> None:
    out = ("-o", "deep.safetensors", "--render", "big.png", "--size", "96x80", "--half", "--json")
    result = invoke("fit-image", photo, *QUICK, *out)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == "sapwood.fit_image/1"
    assert report["size"] == [40, 48]
    assert (report["gaussians"], report["steps"], report["stopped"]) == (60, 40, "steps")
    assert report["options"]["half"] is True
    size = Path("deep.safetensors").stat().st_size
    assert report["bits_per_pixel"] == 8 * size / (40 * 48)
    assert as_image("big.png").shape == (3, 80, 96)
    assert report["psnr"] >= report["psnr_of_file"] > 20
    assert report["files"] == {
        "field": "deep.safetensors",
        "picture": "big.png",
        "compare": "deep-compare.png",
    }


def test_a_field_is_drawn_again(invoke: Invoke, photo: Path) -> None:
    assert invoke("fit-image", photo, *QUICK, "-o", "a").exit_code == 0
    again = ("--render-only", "a.safetensors", "--render", "b.png", "--threads", "1")
    result = invoke("fit-image", *again, "--size", "100x60")
    assert result.exit_code == 0, result.output
    assert "drew 60 Gaussians at 100 x 60: wrote b.png" in result.stdout
    assert as_image("b.png").shape == (3, 60, 100)
    result = invoke("fit-image", *again, "--json")
    assert json.loads(result.stdout)["size"] == [40, 48]
    assert torch.equal(as_image("b.png"), as_image("a-render.png"))


def test_large_photos_are_reduced(invoke: Invoke, photo: Path) -> None:
    result = invoke("fit-image", photo, *QUICK, "--max-side", "24", "--json")
    assert json.loads(result.stdout)["size"] == [20, 24]


def test_the_demo_photo(invoke: Invoke, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("fit-image", *QUICK, "--max-side", "64", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["input"], report["size"]) == ("scikit-learn's china.jpg", [43, 64])
    assert sorted(report["files"].values()) == [
        "china-compare.png",
        "china-render.png",
        "china.safetensors",
    ]


def test_reasons_to_stop_are_told(invoke: Invoke, photo: Path) -> None:
    long = ("--steps", "1000000", "--gaussians", "90", "--threads", "1")
    result = invoke("fit-image", photo, *long, "--time-limit", "0.2")
    assert result.exit_code == 0
    assert "stopped by --time-limit" in result.stdout
    result = invoke("fit-image", photo, *long, "--target-psnr", "20")
    assert result.exit_code == 0
    assert "stopped at --target-psnr" in result.stdout


def test_ctrl_c_keeps_what_there_is(
    invoke: Invoke, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sapwood.gaussian.fit_image

    def interrupted(*args: Any, callback: Callable[[Any], bool], **options: Any) -> Any:
        def watch(now: Any) -> bool:
            if now.step == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return callback(now)

        return real(*args, callback=watch, **options)

    monkeypatch.setattr(sapwood.gaussian, "fit_image", interrupted)
    result = invoke("fit-image", photo, "--steps", "1000", "--threads", "1")
    assert result.exit_code == 130
    assert "finishing this step; Ctrl-C again stops at once" in result.stderr
    assert "20 in" in result.stdout
    assert ", interrupted" in result.stdout
    assert len(GaussianField.load("photo.safetensors")) == 45  # 30 % of the default


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("none.png",), "none.png: No such file or directory"),
        (("text.png",), "image must be an image file"),
        (("photo.png", "-o", "none/a.safetensors"), "does not exist"),
        (("photo.png", "--render", "folder"), "folder is a folder"),
        (("photo.png", "--render", "photo.png"), "photo.png would be overwritten: give another"),
        (("photo.png", "--size", "12"), "--size must be WxH with sides of 1 to 16384, got 12"),
        (("photo.png", "--size", "0x5"), "--size must be WxH with sides of 1 to 16384, got 0x5"),
        (("photo.png", "--device", "tpu"), "--device must be auto, cpu or cuda, got tpu"),
        (("photo.png", "--steps", "0"), "should be greater than or equal to 1"),
        (("photo.png", "--mode", "max"), "'max' is not one of 'sum', 'norm'"),
        (("photo.png", "--time-limit", "0"), "time_limit must be positive, got 0.0"),
        (("photo.png", "--render-only", "a", "--render", "b.png"), "takes no INPUT"),
        (("--render-only", "a.safetensors"), "--render-only needs --render PNG"),
        (("--render-only", "text.png", "--render", "b.png"), "the header must fit the file"),
        (("--render-only", "none", "--render", "b.png"), "none: No such file or directory"),
        (("strip.png", "--loss", "l1ssim"), "image must be at least 11 x 11 for the loss l1ssim"),
    ],
)
def test_bad_arguments_end_with_two(
    invoke: Invoke, photo: Path, arguments: tuple[str, ...], text: str
) -> None:
    Path("text.png").write_text("this is no picture")
    Path("folder").mkdir()
    write_png("strip.png", scene(8, 60))
    before = sorted(path.name for path in Path.cwd().iterdir())
    result = invoke("fit-image", *arguments)
    assert result.exit_code == 2, result.output
    told = " ".join(result.stderr.replace("│", " ").split())
    assert text in told
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_told(invoke: Invoke, photo: Path) -> None:
    result = invoke("fit-image", photo, "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no CUDA device here" in " ".join(result.stderr.replace("│", " ").split())


def test_a_field_too_large_to_draw_needs_a_size(invoke: Invoke, photo: Path) -> None:
    GaussianField(
        torch.zeros(1, 2), torch.ones(1, 3), torch.ones(1, 3), height=2, width=20_000
    ).save("wide.safetensors")
    result = invoke("fit-image", "--render-only", "wide.safetensors", "--render", "a.png")
    assert result.exit_code == 2
    assert "give a smaller --size" in " ".join(result.stderr.replace("│", " ").split())


def test_small_and_wide_images_have_a_side_by_side(invoke: Invoke, photo: Path) -> None:
    from sapwood.cli.side_by_side import side_by_side

    for size in ((1, 1), (3, 500), (300, 20)):
        content = side_by_side(torch.rand(4, *size), torch.rand(4, *size), "caption")
        Path("a.png").write_bytes(content)
        assert min(as_image("a.png").shape[1:]) > 20


def test_the_demo_photo_is_scikit_learns() -> None:
    assert command.demo_photo(256).shape == (3, 171, 256)
