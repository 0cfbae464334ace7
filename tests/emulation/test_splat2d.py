"""The CUDA kernels of splat2d, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sapwood.ops  # noqa: F401  loads the CPU kernels
from tests.emulation import run_splat2d
from tests.emulation import splat2d_checks as checks
from tests.emulation.splat2d_checks import CUTOFF, DTYPES, SHAPES, Shape, problem
from tests.splat2d_scenes import Scene, random_scene

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SMALL: Shape = (2, 12, 3, 18, 20)


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@by_shape
def test_image(ops: Any, shape: Shape) -> None:
    checks.check_image(ops, problem(shape))


@by_shape
def test_gradients(ops: Any, shape: Shape) -> None:
    checks.check_gradients(ops, problem(shape))


@by_shape
def test_pairs(ops: Any, shape: Shape) -> None:
    checks.check_pairs(ops, problem(shape))


@by_dtype
def test_dtypes(ops: Any, dtype: torch.dtype) -> None:
    checks.check_image(ops, problem(SMALL, dtype))
    checks.check_gradients(ops, problem(SMALL, dtype), stats=False)


def test_counts(ops: Any) -> None:
    checks.check_counts(ops, problem((3, 20, 3, 18, 20)))


def test_what_is_not_a_gaussian(ops: Any) -> None:
    checks.check_not_drawn(ops)


@pytest.mark.parametrize("cutoff", [2.0, math.inf])
def test_other_cuts(ops: Any, cutoff: float) -> None:
    scene = random_scene(1, 20, 3, (17, 20), seed=3)
    wide = Scene(scene.mu.double(), scene.chol.double(), scene.feat.double(), scene.size)
    checks.check_image(ops, wide, cutoff)
    checks.check_gradients(ops, wide, cutoff)
    checks.check_pairs(ops, wide, cutoff)


def test_gaussians_of_many_rows_take_the_whole_block(ops: Any) -> None:
    scene = problem((1, 6, 3, 70, 9))
    tall = torch.tensor([2.0, 1.0, 60.0]).expand_as(scene.chol).clone()
    tall[0, 2] = torch.tensor([1.0, 0.0, 1.0])
    wide = Scene(scene.mu.double(), tall.double(), scene.feat.double(), scene.size)
    checks.check_gradients(ops, wide)


def test_more_gaussians_on_a_tile_than_a_round_and_a_stage_hold(ops: Any) -> None:
    n = 4200  # a round reads 4096 bits of the list, a stage holds 128 Gaussians
    mu = torch.full((1, n, 2), 3.0)
    chol = torch.tensor([0.3, 0.0, 0.3]).expand(1, n, 3)
    image = ops.splat2d(mu, chol, torch.ones(1, n, 1), None, 5, 5, CUTOFF)
    assert image[0, 0, 3, 3].item() == n


@pytest.mark.slow
def test_large_lists_are_drawn_in_slabs(ops: Any) -> None:
    """The lists of 256 tiles for 45 000 Gaussians are more than a slab may take."""
    n = 45_000
    mu = torch.full((1, n, 2), -100.0)
    mu[0, -2:] = torch.tensor([[70.0, 40.0], [250.0, 252.0]])  # in the first slab, and in the last
    chol = torch.tensor([1.0, 0.0, 1.0]).expand(1, n, 3)
    image = ops.splat2d(mu, chol, torch.ones(1, n, 1), None, 256, 256, CUTOFF)
    kept = slice(n - 2, n)
    alone = ops.splat2d(mu[:, kept], chol[:, kept], torch.ones(1, 2, 1), None, 256, 256, CUTOFF)
    assert torch.equal(image, alone)
    assert image[0, 0, 40, 70] == 1 == image[0, 0, 252, 250]


def test_layouts_are_bitwise_equal(ops: Any) -> None:
    scene = problem(SMALL)
    args = (scene.mu, scene.chol, scene.feat, None)
    grad = checks.image_grad(scene)
    wanted = ops.splat2d_backward(grad, *args, CUTOFF, True)
    strided = tuple(t.mT.contiguous().mT for t in args[:3])
    got = ops.splat2d_backward(grad.mT.contiguous().mT, *strided, None, CUTOFF, True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    image = ops.splat2d(*strided, None, *scene.size, CUTOFF)
    assert torch.equal(image, ops.splat2d(*args, *scene.size, CUTOFF))


def test_twenty_runs_are_bitwise_equal(ops: Any) -> None:
    first = run_splat2d.run(ops, run_splat2d.REPEATED)
    for _ in range(19):
        assert run_splat2d.run(ops, run_splat2d.REPEATED) == first


def test_results_do_not_depend_on_the_order_of_blocks(ops: Any, emulation_library: Path) -> None:
    shuffled = emulation_library.with_name("_ops_emu_shuffled.so")
    if not shuffled.is_file():
        pytest.fail(f"{shuffled.name} is missing: build it with 'make emulation'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulation.run_splat2d", str(shuffled)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        cwd=Path(__file__).resolve().parents[2],
    )
    digests = run_splat2d.run(ops, run_splat2d.ALL)
    assert json.loads(done.stdout) == digests
    assert len(set(digests.values())) > len(run_splat2d.ALL)


SCENE = random_scene(2, 4, 3, (5, 6))
HEAD = (SCENE.mu, SCENE.chol, SCENE.feat)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "splat2d",
            (HEAD[0], HEAD[1][:, :3], HEAD[2], None, 5, 6, 1.0),
            "splat2d: chol must have shape (2, 4, 3), got (2, 3, 3)",
        ),
        (
            "splat2d",
            (*HEAD[:2], HEAD[2][..., :0], None, 5, 6, 1.0),
            "splat2d: feat must have at least 1 channel, got 0",
        ),
        (
            "splat2d",
            (*HEAD, torch.ones(2), 5, 6, 1.0),
            "splat2d: counts must be int64, got Float",
        ),
        ("splat2d", (*HEAD, None, 0, 6, 1.0), "splat2d: size must be at least (1, 1), got (0, 6)"),
        ("splat2d", (*HEAD, None, 5, 6, 0.0), "splat2d: cutoff must be positive, got 0"),
        (
            "splat2d_backward",
            (torch.ones(2, 2, 5, 6), *HEAD, None, 1.0, False),
            "splat2d_backward: grad must have shape (2, 3, 5, 6), got (2, 2, 5, 6)",
        ),
        (
            "splat2d_pairs",
            (HEAD[0].long(), HEAD[1].long(), None, 5, 6, 1.0),
            "splat2d_pairs: mu must be float32, float64, float16 or bfloat16, got Long",
        ),
    ],
)
def test_inconsistent_arguments_are_refused(
    ops: Any, op: str, arguments: tuple[Any, ...], message: str
) -> None:
    for namespace in (ops, torch.ops.sapwood):
        with pytest.raises(RuntimeError) as raised:
            getattr(namespace, op)(*arguments)
        assert f"sapwood.{message}" in str(raised.value)
