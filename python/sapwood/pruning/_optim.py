"""What a pruner does to an optimizer: clear its state where weights are off, find master copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood.pruning._distributed import local, place, totals

#: Optimizers whose update of a zero weight with zero gradient and zero state is exactly zero.
KEEPS_ZEROS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
)


def require_attachable(
    optimizer: Optimizer, attached: Sequence[Optimizer], enforce: str, where: str
) -> None:
    """Raises unless a pruner with these optimizers and this enforcement can follow another one."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{where}: optimizer must be a torch Optimizer, got {optimizer!r}")
    if optimizer in attached:
        raise ValueError(f"{where}: optimizer must not be attached yet, got it twice")
    if enforce == "on_update" and type(optimizer) not in KEEPS_ZEROS:
        raise ValueError(
            f"{where}: optimizer must be SGD, Adam or AdamW with enforce='on_update', "
            f"got {type(optimizer).__name__}"
        )


class StateCleaner:
    """Clears the state of optimizers, and says once when some of it has to be left alone."""

    def __init__(self) -> None:
        self._warned = False

    def clear(self, optimizer: Optimizer, keep: Mapping[nn.Parameter, Tensor]) -> None:
        """Zeroes every state tensor of a parameter's shape where the mask is False."""
        with torch.no_grad():
            skipped = _clear(optimizer, keep)
        if skipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"sapwood.pruning.Pruner: state {', '.join(skipped)} of "
                f"{type(optimizer).__name__} does not have the parameter's shape and is left "
                "alone; the weights themselves stay zero",
                UserWarning,
                stacklevel=2,
            )


def _clear(optimizer: Optimizer, keep: Mapping[nn.Parameter, Tensor]) -> list[str]:
    """Returns the names of state tensors of another shape, such as factored moments."""
    skipped: set[str] = set()
    for parameter, mask in keep.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape:
                local(value).masked_fill_(~local(place(mask, value)), 0)
            elif value.numel() > 1:
                skipped.add(key)
    return sorted(skipped)


def state_zeros(
    optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]
) -> tuple[int, int]:
    """Zeros and elements of the state tensors that have their parameter's shape."""
    wanted = list(parameters)
    states = [
        value
        for optimizer in optimizers
        for parameter in wanted
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    nonzero = totals([[int(local(value).count_nonzero())] for value in states], states)
    total = sum(value.numel() for value in states)
    return total - sum(count for (count,) in nonzero), total


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
