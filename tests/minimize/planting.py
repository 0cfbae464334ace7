"""Networks and masks with everything that minimization must find: dead units, constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sapwood.minimize import MinimizeReport, minimize

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@torch.no_grad()
def mask_randomly(model: nn.Module, seed: int, density: float = 0.5) -> None:
    """Random zeros; a fifth of the rows and of the columns of wide layers are dead."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LAYERS):
            weight = module.weight
            out, inputs = weight.shape[:2]
            weight *= torch.rand(weight.shape, generator=generator) < density
            weight[torch.rand(out, generator=generator) < 0.2] = 0.0
            if inputs > 4:
                weight[:, torch.rand(inputs, generator=generator) < 0.2] = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            weight = module.in_proj_weight
            weight *= torch.rand(weight.shape, generator=generator) < density
            weight[torch.rand(len(weight), generator=generator) < 0.2] = 0.0


@torch.no_grad()
def silence(model: nn.Module, channel: int, writers: Sequence[str], norms: Sequence[str]) -> None:
    """Makes one channel of a residual stream a constant.

    Args:
        model: the network.
        channel: the index in the stream.
        writers: parameters that write it: rows of weights, entries of vectors and tables.
        norms: norms that read it; their gain is set to 0, so that readers see a constant.
    """
    for name in writers:
        parameter = model.get_parameter(name)
        if name.endswith(("positions", "token")) or "tokens." in name or "positions." in name:
            parameter[..., channel] = 0.3
        else:
            parameter[channel] = 0.0
    for name in norms:
        model.get_submodule(name).weight[channel] = 0.0  # type: ignore[index,operator]


def largest_difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """|difference| over max(1, the largest |output|)."""
    with torch.no_grad():
        a, b = one(x), other(x)
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max().clamp(min=1.0)).item()


def minimized(model: nn.Module, x: Tensor, **options: object) -> tuple[nn.Module, MinimizeReport]:
    """Minimizes and checks what must hold for every network.

    Exact in float64 on other samples, one and seven of them where the inputs are a batch, and never
    larger.
    """
    small, report = minimize(model, x, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(99)
    for n in (1, 7):
        if x.is_floating_point():
            fresh = torch.randn(n, *x.shape[1:], generator=generator, dtype=x.dtype)
        else:
            fresh = x[:1].expand(n, -1).roll(1, -1)
        assert largest_difference(model, small, fresh) <= 1e-9
    assert report.parameters_after <= report.parameters_before
    assert report.macs_after <= report.macs_before
    assert report.max_error is not None
    assert report.max_error <= 1e-9
    return small, report


def kept(report: MinimizeReport, group: str) -> list[int]:
    """The channels that the layer of a name keeps."""
    (found,) = [g for g in report.plan.groups if g.name == group]
    return found.kept


def refusals(report: MinimizeReport) -> str:
    """All refusals as one text."""
    return "\n".join(str(refusal) for refusal in report.refusals)


class Net(nn.Module):
    """Named layers and a forward pass given as a function."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def chain(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row, in float64 and evaluation mode, with lively norms."""
    torch.manual_seed(0)
    return prepared(nn.Sequential(*layers))  # type: ignore[return-value]


def prepared(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.double().eval()


def dead(layer: nn.Module, row: int, bias: float | None = None) -> None:
    """Zeroes a row of a weight; its bias becomes the unit's constant."""
    layer.weight.data[row] = 0.0  # type: ignore[union-attr,operator,index]
    if bias is not None:
        layer.bias.data[row] = bias  # type: ignore[union-attr,operator,index]


def unread(layer: nn.Module, column: int) -> None:
    layer.weight.data[:, column] = 0.0  # type: ignore[union-attr,operator,index]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
