"""Moving an optimizer from a network to its minimized form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sapwood.minimize.report import MinimizeReport, Moved

__all__ = ["remap_optimizer"]


def remap_optimizer(optimizer: Optimizer, report: MinimizeReport) -> None:
    """Points an optimizer at the minimized parameters and cuts its moments as they were cut.

    Where units were merged, the moments are those of the unit that stayed. Parameters that no
    longer exist, such as the projections of a rebuilt attention or layers that were multiplied out,
    leave the optimizer; parameters that surgery created, such as a new bias, are to be added with
    ``optimizer.add_param_group``.

    Example:
        >>> import torch
        >>> from sapwood.minimize import minimize, remap_optimizer
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).eval()
        >>> _ = model[2].weight.data[:, 1].zero_()
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> small, report = minimize(model, torch.randn(2, 4))
        >>> remap_optimizer(optimizer, report)
        >>> optimizer.param_groups[0]["params"][0].shape
        torch.Size([2, 4])

    Args:
        optimizer: of the network that was minimized; changed in place.
        report: what ``minimize`` returned; both networks must still exist.

    Raises:
        RuntimeError: if a parameter of the optimizer is none of the network's.
    """
    targets: dict[int, tuple[Tensor, Moved]] = {}
    for name, (old, new) in report.tracked.items():
        before, after = old(), new()
        if before is not None and after is not None:
            targets[id(before)] = (after, report.param_map[name])
    known = {id(p) for ref in report.removed if (p := ref()) is not None}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in targets and id(parameter) not in known:
                raise RuntimeError(
                    "sapwood.minimize.remap_optimizer: optimizer must hold parameters of the "
                    f"minimized network, got one of shape {tuple(parameter.shape)} that is not"
                )
    state = optimizer.state
    for group in optimizer.param_groups:
        kept: list[Tensor] = []
        for parameter in group["params"]:
            entries = state.pop(parameter, None)
            if id(parameter) not in targets:
                continue
            after, moved = targets[id(parameter)]
            kept.append(after)
            if entries is not None:
                state[after] = {k: _moved(v, parameter, moved) for k, v in entries.items()}
        group["params"] = kept


def _moved(value: Any, parameter: Tensor, moved: Moved) -> Any:
    """Moments have the parameter's shape; counters and scalars stay."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim():
        with torch.no_grad():
            return moved.slice(value)
    return value
