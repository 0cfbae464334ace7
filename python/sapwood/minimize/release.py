"""Release: exact zeros inside compacted tensors become small noise that can be trained again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood import _check
from sapwood.pruning.criteria import named_generator

__all__ = ["ReleaseReport", "ReleasedTensor", "release"]

_WHERE = "minimize.release"
_NOISES = ("normal", "rademacher", "norm")
_MOST_HALVINGS = 20


@dataclass(frozen=True)
class ReleasedTensor:
    """One weight: how many zeros became noise, of which standard deviation, or why none did."""

    name: str
    zeros: int
    released: int
    scale: float
    reason: str = ""


@dataclass(frozen=True)
class ReleaseReport:
    """What :func:`release` did; ``factor`` is the power of two by which all noise was reduced."""

    tensors: tuple[ReleasedTensor, ...]
    loss_before: float
    loss_after: float
    factor: float

    @property
    def released(self) -> int:
        """Zeros that became noise."""
        return sum(tensor.released for tensor in self.tensors)

    @property
    def rise(self) -> float:
        """Relative rise of the calibration loss."""
        if self.loss_before == 0:
            return 0.0 if self.loss_after == 0 else math.inf
        return self.loss_after / self.loss_before - 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "released": self.released, "rise": self.rise}

    def __str__(self) -> str:
        lines = [f"released {self.released} zeros, calibration loss {self.rise:+.3%}"]
        for t in self.tensors:
            how = t.reason or f"noise of {t.scale:.3g}"
            lines.append(f"  {t.name}: {t.released} of {t.zeros} zeros, {how}")
        return "\n".join(lines)


def release(
    model: nn.Module,
    calibration_batch: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    tau: float = 0.02,
    delta: float = 0.01,
    noise: str = "normal",
    seed: int = 0,
) -> ReleaseReport:
    """Turns exact zeros in linear and convolutional weights into calibrated noise, in place.

    In every layer the noise changes the root mean square of the output by about ``tau``, relative
    to what the weights give without it; all of it is then halved until the loss on the batch rises
    by at most ``delta``. Biases and norms stay as they are, depthwise filters too.

    Example:
        >>> import torch
        >>> from sapwood.minimize import release
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> _ = model.weight.data[:, :4].zero_()
        >>> batch = torch.randn(32, 8), torch.randint(0, 4, (32,))
        >>> report = release(model, batch)
        >>> report.released, report.rise < 0.01, bool((model.weight != 0).all())
        (16, True, True)

    Args:
        model: a minimized model, or any; it is run in evaluation mode and left in its own.
        calibration_batch: (X, y), moved to the model's device; the model is called as ``model(X)``.
        loss_fn: (output, y) -> scalar; default: cross entropy.
        tau: relative change of a layer's output, positive.
        delta: largest relative rise of the loss, not negative.
        noise: ``"normal"``, ``"rademacher"`` (signs only), or ``"norm"``: normal noise of 0.02
            times the root mean square of the layer's non-zeros, whatever its inputs are.
        seed: of the noise; it depends on the seed and the parameter's name alone.

    Returns:
        What was released, per tensor, and the loss before and after.

    Raises:
        ValueError: if an argument is outside its range or the loss is not finite.

    References:
        Ours, for Squeeze-Release, arXiv:2606.14346, which says that zeros become small calibrated
        noise; its calibration was not readable.
    """
    _require(tau, delta, noise)
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in calibration_batch)
    criterion = loss_fn or F.cross_entropy
    with evaluating(model), torch.no_grad():
        found = _observe(model, x)
        before = float(criterion(model(x), y))
        if not math.isfinite(before):
            _check.fail(ValueError, _WHERE, "calibration_batch", "have a finite loss", before)
        draws, tensors = [], []
        for name, layer in found.items():
            scale, reason = _scale(layer, tau, noise)
            zeros = layer.module.weight == 0
            if reason:
                tensors.append(ReleasedTensor(name, int(zeros.sum()), 0, 0.0, reason))
                continue
            draws.append((name, layer.module.weight, zeros, scale))
        factor, after = _settle(model, (x, y), criterion, draws, before * (1 + delta), noise, seed)
    for name, weight, zeros, scale in draws:
        released = int((weight[zeros] != 0).sum())
        tensors.append(ReleasedTensor(name, int(zeros.sum()), released, scale * factor))
    return ReleaseReport(tuple(tensors), before, before if after is None else after, factor)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to the mode of every single module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class _Layer:
    """A layer as one batch showed it."""

    module: nn.Linear | nn.Conv2d
    inputs: Tensor  # (in,) float64, mean square of each input channel
    output: float  # mean square of the outputs without the bias


def _observe(model: nn.Module, x: Tensor) -> dict[str, _Layer]:
    found: dict[str, _Layer] = {}
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        axis = -1 if isinstance(module, nn.Linear) else -3
        rows = args[0].detach().movedim(axis, -1).flatten(0, -2).double()
        if isinstance(module, nn.Linear):
            plain = F.linear(args[0], module.weight)
        else:
            plain = module._conv_forward(args[0], module.weight, None)
        square = plain.double().square().mean().item()
        name = f"{names[module]}.weight" if names[module] else "weight"
        found[name] = _Layer(module, rows.square().mean(0), square)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _scale(layer: _Layer, tau: float, noise: str) -> tuple[float, str]:
    """Standard deviation of the noise of one layer, or why there is none."""
    module = layer.module
    weight, zeros = module.weight, module.weight == 0
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return 0.0, "a grouped or depthwise convolution"
    if not bool(zeros.any()):
        return 0.0, "no zeros"
    if noise == "norm":
        rest = weight[~zeros].double()
        if rest.numel() == 0:
            return 0.0, "no non-zeros to go by"
        return 0.02 * rest.square().mean().sqrt().item(), ""
    counts = zeros.double().flatten(2).sum(2) if weight.dim() > 2 else zeros.double()
    energy = (counts @ layer.inputs).mean().item()
    if energy == 0:
        return 0.0, "no input where the zeros are"
    if layer.output == 0:
        return 0.0, "no output to go by"
    return tau * math.sqrt(layer.output / energy), ""


def _settle(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    draws: list[tuple[str, Tensor, Tensor, float]],
    most: float,
    noise: str,
    seed: int,
) -> tuple[float, float | None]:
    """Writes the noise, halved until the loss is low enough; takes it back when it never is."""
    units = {}
    for name, weight, zeros, _ in draws:
        normal = torch.randn(weight.shape, generator=named_generator(seed, name))
        unit = normal.sign() if noise == "rademacher" else normal
        units[name] = unit.to(weight.device)[zeros].double()
    factor, after = 1.0, None
    for _ in range(_MOST_HALVINGS + 1):
        for name, weight, zeros, scale in draws:
            weight[zeros] = flushed((units[name] * (scale * factor)).to(weight.dtype))
        after = float(loss_fn(model(batch[0]), batch[1]))
        if after <= most:
            return factor, after
        factor /= 2
    for _, weight, zeros, _ in draws:
        weight[zeros] = 0.0
    return 0.0, None


def flushed(values: Tensor) -> Tensor:
    """Without denormals, which are slow to compute with."""
    return torch.where(values.abs() < torch.finfo(values.dtype).tiny, 0.0, values)


def _require(tau: float, delta: float, noise: str) -> None:
    if not math.isfinite(tau) or tau <= 0:
        _check.fail(ValueError, _WHERE, "tau", "be finite and positive", tau)
    if not math.isfinite(delta) or delta < 0:
        _check.fail(ValueError, _WHERE, "delta", "be finite and not negative", delta)
    _check.one_of(_WHERE, "noise", noise, _NOISES)
