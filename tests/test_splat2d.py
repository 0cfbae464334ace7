"""The splat2d family: samples of every op, and the battery over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops
from tests.check_op import (
    DifferentiableBattery,
    Sample,
    TraceableBattery,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)
from tests.splat2d_scenes import CUTOFF, Scene, Terms, clear_scene, random_scene

#: name -> (scene, counts, cutoff, whether gradients are checked numerically)
Case = tuple[Scene, Tensor | None, float, bool]


def shifted(scene: Scene, by: float) -> Scene:
    return Scene(scene.mu + by, scene.chol, scene.feat, scene.size)


def shaped(scene: Scene, l1: float, l2: float, l3: float) -> Scene:
    chol = torch.tensor([l1, l2, l3]).expand_as(scene.chol).clone()
    return Scene(scene.mu, chol, scene.feat, scene.size)


def cases() -> dict[str, Case]:
    counts = torch.tensor([1, 2])
    return {
        "main": (clear_scene(2, 12, 3, (20, 33)), None, CUTOFF, False),
        "3-gaussians": (random_scene(1, 3, 2, (4, 5)), None, math.inf, True),
        "cut": (clear_scene(1, 3, 3, (5, 6), cutoff=4.0), None, 4.0, True),
        "1-channel": (random_scene(2, 2, 1, (3, 4)), None, math.inf, True),
        "counts": (random_scene(2, 2, 4, (4, 3)), counts, math.inf, True),
        "1x1-image": (random_scene(1, 3, 1, (1, 1)), None, math.inf, True),
        "narrow": (random_scene(1, 2, 3, (1, 7)), None, math.inf, True),
        "5x7-17-channels": (clear_scene(1, 9, 17, (5, 7)), None, CUTOFF, False),
        "50x16": (clear_scene(1, 20, 4, (50, 16)), None, CUTOFF, False),
        "none": (random_scene(1, 0, 3, (4, 4)), None, CUTOFF, False),
        "empty-batch": (random_scene(0, 3, 3, (4, 4)), None, CUTOFF, False),
        "no-counts": (random_scene(2, 3, 3, (4, 4)), torch.tensor([0, 0]), CUTOFF, False),
        "outside": (shifted(random_scene(1, 5, 3, (9, 9)), 100.0), None, CUTOFF, False),
        "far-away": (shifted(random_scene(1, 5, 3, (9, 9)), 1e9), None, math.inf, False),
        "small": (shaped(random_scene(1, 30, 3, (20, 20)), 0.3, 0.0, 0.3), None, CUTOFF, False),
        "wide": (shaped(random_scene(1, 4, 3, (20, 20)), 100.0, 10.0, 50.0), None, CUTOFF, False),
        "sheared": (clear_scene(1, 6, 2, (40, 40), cutoff=8.0), None, 8.0, False),
        "many": (clear_scene(1, 70, 3, (16, 16), sigma=1.0), None, CUTOFF, False),
    }


CASES = cases()


def tags(name: str) -> frozenset[str]:
    return frozenset({"main"} if name == "main" else ())


class TestSplat2d(DifferentiableBattery):
    name = "splat2d"
    vmappable = (0, 1, 2)
    samples = tuple(
        Sample(
            name,
            (s.mu, s.chol, s.feat, counts, *s.size, cutoff),
            (0, 1, 2) if checked else (),
            tags(name),
        )
        for name, (s, counts, cutoff, checked) in CASES.items()
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[1])

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        mu, chol, feat, _, height, width, cutoff = args
        mu = torch.where(mu.isfinite(), mu, 1e9)
        terms = Terms(mu, chol, (height, width), cutoff)
        return (terms.image_magnitude(feat, self.precision),)


class TestSplat2dBackward(DifferentiableBattery):
    name = "splat2d_backward"
    vmappable = (0, 1, 2, 3)
    samples = tuple(
        Sample(
            f"{name}-{'stats' if stats else 'plain'}",
            (
                torch.randn(len(s.mu), s.feat.shape[2], *s.size),
                s.mu,
                s.chol,
                s.feat,
                counts,
                cutoff,
                stats,
            ),
            (0, 1, 2, 3) if checked else (),
            tags(name) if stats else frozenset(),
        )
        for at, (name, (s, counts, cutoff, checked)) in enumerate(CASES.items())
        for stats in ((False, True) if name == "main" else (at % 2 == 0,))
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[2] * args[0].shape[3])

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        grad, mu, chol, feat, _, cutoff, stats = args
        mu = torch.where(mu.isfinite(), mu, 1e9)
        terms = Terms(mu, chol, tuple(grad.shape[2:]), cutoff)
        found = terms.gradient_magnitudes(grad, feat, self.precision)
        return (*found[:3], found[3] if stats else found[3][:, :0])


class TestSplat2dPairs(TraceableBattery):
    name = "splat2d_pairs"
    exact = True
    vmappable = (0, 1)
    samples = tuple(
        Sample(name, (s.mu, s.chol, counts, *s.size, cutoff), tags=tags(name))
        for name, (s, counts, cutoff, _) in CASES.items()
    )
