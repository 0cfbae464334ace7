"""What a pruner does to an optimizer: clear its state where weights are off, find master copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: Optimizers whose update of a zero weight with zero gradient and zero state is exactly zero.
KEEPS_ZEROS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
)


class StateCleaner:
    """Clears the state of optimizers, and says once when some of it has to be left alone."""

    def __init__(self) -> None:
        self._warned = False

    def clear(self, optimizer: Optimizer, off: Mapping[nn.Parameter, Tensor]) -> None:
        """Zeroes every state tensor of a parameter's shape where the weight is off."""
        with torch.no_grad():
            skipped = _clear(optimizer, off)
        if skipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"sapwood.pruning.Pruner: state {', '.join(skipped)} of "
                f"{type(optimizer).__name__} does not have the parameter's shape and is left "
                "alone; the weights themselves stay zero",
                UserWarning,
                stacklevel=2,
            )


def _clear(optimizer: Optimizer, off: Mapping[nn.Parameter, Tensor]) -> list[str]:
    """Returns the names of state tensors of another shape, such as factored moments."""
    skipped: set[str] = set()
    for parameter, where in off.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape:
                value.masked_fill_(where.to(value.device), 0)
            elif value.numel() > 1:
                skipped.add(key)
    return sorted(skipped)


def state_zeros(
    optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]
) -> tuple[int, int]:
    """Zeros and elements of the state tensors that have their parameter's shape."""
    zeros = total = 0
    wanted = list(parameters)
    for optimizer in optimizers:
        for parameter in wanted:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    zeros += value.numel() - int(value.count_nonzero())
                    total += value.numel()
    return zeros, total


def masters(
    optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]
) -> list[tuple[nn.Parameter, Tensor]]:
    """The float32 copies that optimizers keep of narrow parameters, as (parameter, copy)."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    narrow = [p for p in parameters if p.dtype in (torch.float16, torch.bfloat16)]
    for optimizer in optimizers:
        for parameter in narrow:
            for key, value in optimizer.state.get(parameter, {}).items():
                if (
                    "master" in str(key)
                    and isinstance(value, Tensor)
                    and value.dtype == torch.float32
                    and value.shape == parameter.shape
                ):
                    pairs.append((parameter, value))
    return pairs


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler made this step a no-op inside the optimizer.

    With ordinary optimizers the scaler does not call ``step`` at all; fused ones are called and
    decide by this tensor.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.any())


def with_masked_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of ``step`` with a closure that masks the gradients it computes."""

    def wrap(closure: Callable[[], Any]) -> Callable[[], Any]:
        def masked() -> Any:
            loss = closure()
            mask()
            return loss

        return masked

    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None
