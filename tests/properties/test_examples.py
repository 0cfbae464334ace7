"""The examples themselves: how many there are, and that they are the same in every run."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties.strategies import SIZES, Source, example_settings


def test_the_number_of_examples_can_be_chosen() -> None:
    usual, nightly = example_settings(None), example_settings("10000")
    assert (usual.max_examples, usual.derandomize) == (200, True)
    assert (nightly.max_examples, nightly.derandomize) == (10_000, False)


@pytest.mark.parametrize("given_", ["0", "-1", "many", ""])
def test_a_number_of_examples_must_be_positive(given_: str) -> None:
    with pytest.raises(ValueError, match="PROPERTY_EXAMPLES must be a positive number, got "):
        example_settings(given_)


def drawn() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    @settings(example_settings(None))
    @given(st.integers(0, 2**31), st.sampled_from(range(10**6)))
    def draw(number: int, place: int) -> None:
        found.append((number, place))

    draw()
    return found


def test_examples_do_not_follow_loaded_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis would mix in the constants of the new module."""
    before = drawn()
    constants = ", ".join(str(123_457 + 1_009 * i) for i in range(500))
    (tmp_path / "newly_loaded.py").write_text(f"CONSTANTS = [{constants}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("newly_loaded")
    assert drawn() == before
    assert len(set(before)) > 100


BOUNDS = ((0, 3), (1, 17), (0, SIZES[-1]), (2, SIZES[-1]))


@st.composite
def some_sizes(draw: st.DrawFn) -> tuple[int, ...]:
    return Source(draw).sizes(*BOUNDS, most=500)


@settings(example_settings(None))
@given(some_sizes())
def test_sizes_stay_within_their_bounds(sizes: tuple[int, ...]) -> None:
    product = 1
    for size, (low, high) in zip(sizes, BOUNDS, strict=True):
        assert low <= size <= high
        product *= max(1, size)
    assert product <= 500 * 2  # the last one is 2 at least
