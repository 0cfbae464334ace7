"""Exact small programs: a traffic light, dice, and the weather, each under several readings."""

from __future__ import annotations

from collections.abc import Generator
from fractions import Fraction
from typing import Any

from sapwood import nesy


@nesy.do
def safe() -> Generator[Any, Any, Any]:
    """Nobody drives unless the light is green."""
    light = yield nesy.choice({"red": 0.6, "yellow": 0.1, "green": 0.3})
    drive = yield nesy.bernoulli(nesy.table({"red": 0.1, "yellow": 0.2, "green": 0.9})[light])
    return ~drive | (light == "green")


@nesy.do
def six_then_even() -> Generator[Any, Any, Any]:
    """A six, and an even number after it."""
    first = yield nesy.uniform(range(1, 7))
    second = yield nesy.uniform(range(1, 7))
    return (first == 6) & (second % 2 == 0)


@nesy.do
def bad_weather() -> Generator[Any, Any, Any]:
    """Humid and cold, or dry and hot."""
    humid = yield nesy.bernoulli(0.4)
    t = yield (nesy.normal(16.0, 3.0) if humid else nesy.normal(22.0, 4.0))
    return (humid & (t < 15)) | (~humid & (t > 25))


def main() -> None:
    """Prints each sentence under each monad and checks the exact values."""
    probability = safe().truth(nesy.Dist)
    print(f"safe: probability {probability:.4f}, possible {safe().truth(nesy.Powerset)}")
    print(f"      best branch {safe().truth(nesy.MaxPlus).exp():.4f}: {safe().map().assignment}")
    assert abs(probability - 0.92) < 1e-12
    dice = six_then_even().truth(nesy.Dist(number=Fraction))
    print(f"a six, then an even number: {dice}")
    assert dice == Fraction(1, 12)
    weather = bad_weather().truth(nesy.GirySampler, num_samples=1_000_000, seed=0)
    print(f"bad weather: {weather.mean:.5f} +- {weather.stderr:.5f} (exact: 0.28375)")
    assert abs(weather.mean - 0.2837529475) < 4 * weather.stderr


if __name__ == "__main__":
    main()
