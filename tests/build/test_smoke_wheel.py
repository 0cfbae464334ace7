"""Which wheel is smoked, and that the checks notice a wrong family or a wrong package."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import smoke_checks
import smoke_wheel
import torch

X86 = Path("dist/sapwood-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl")
ARM = Path("dist/sapwood-0.1.0-cp311-cp311-manylinux_2_34_aarch64.whl")


def test_the_wheel_of_this_machine_is_taken() -> None:
    assert smoke_wheel.wheel_for("x86_64", [ARM, X86]) == X86
    assert smoke_wheel.wheel_for("aarch64", [ARM, X86]) == ARM


@pytest.mark.parametrize(("wheels", "got"), [([ARM], "none"), ([X86, X86], X86.name)])
def test_no_or_two_wheels(wheels: list[Path], got: str) -> None:
    with pytest.raises(SystemExit, match=f"one wheel must be for x86_64, got {got}"):
        smoke_wheel.wheel_for("x86_64", wheels)


def test_every_family_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["smoke_checks"])
    assert smoke_checks.main() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        ["ok", check.__name__] for check in smoke_checks.FAMILIES
    ]


def raising() -> float:
    raise ArithmeticError("no good")


@pytest.mark.parametrize(
    ("check", "detail"),
    [
        (lambda: 2e-5, "values and gradients within 2e-05"),
        (lambda: float("nan"), "values and gradients within nan"),
        (raising, "ArithmeticError: no good"),
    ],
)
def test_a_fault_is_reported(
    check: object,
    detail: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["smoke_checks"])
    monkeypatch.setattr(smoke_checks, "FAMILIES", (check, smoke_checks.logsemiring))
    assert smoke_checks.main() == 1
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED")
    assert detail in first
    assert second.startswith("ok"), "the other families still run"


def test_differences_in_values_and_gradients_count() -> None:
    x = torch.linspace(1, 2, 7)
    assert smoke_checks.differ(lambda x: x * x, lambda x: x * x, [x]) < 1e-6
    assert smoke_checks.differ(lambda x: 1.01 * x * x, lambda x: x * x, [x]) > 0.009
    same_value = lambda x: x * x.detach()  # noqa: E731  half of the gradient
    assert math.isnan(smoke_checks.differ(lambda x: x / (x - 1), lambda x: x, [x]))
    assert smoke_checks.differ(same_value, lambda x: x * x, [x]) == pytest.approx(0.5)


def test_another_package_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["smoke_checks", "--installed-in", str(tmp_path)])
    assert smoke_checks.main() == 1
    assert f"sapwood must be under {tmp_path}, got " in capsys.readouterr().err
