"""Gradients for criteria: batches, the state of a model while it is scored, sums over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from sapwood.pruning._names import _WRAPPERS, NamedParameters, require_prunable, shape_of
from sapwood.pruning.criteria import own_data, score_dtype
from sapwood.pruning.masks import MaskSet

Pair = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to be scored, without its wrappers, and the parameters that the masks name.

    Two parameters can share one storage, so ``leaves`` holds every object behind a name.
    """

    model: nn.Module
    leaves: dict[str, list[nn.Parameter]]
    named: NamedParameters
    where: str

    @classmethod
    def of(cls, model: nn.Module, masks: MaskSet, where: str) -> Subject:
        """The subject, checked; nothing has changed when this raises."""
        named = NamedParameters.of(model)
        found = masks.parameters_of(named, True, where)
        lazy = {n: p for n, p in named.parameters.items() if isinstance(p, UninitializedParameter)}
        require_prunable(lazy, where)
        for name, parameter in found.items():
            if hasattr(parameter, "device_mesh"):  # autograd does not reach these from the loss
                raise NotImplementedError(
                    f"{where}: {name} must be an ordinary tensor, got a sharded "
                    f"{type(parameter.data).__name__}; score the model before fully_shard"
                )
        return cls(bare(model), {name: objects_of(named, name) for name in found}, named, where)


def bare(model: nn.Module) -> nn.Module:
    """The model inside wrappers for data parallelism, averaging and compilation."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def objects_of(named: NamedParameters, name: str) -> list[nn.Parameter]:
    """The distinct parameter objects behind a name."""
    owners = named.owners[named.aliases.get(name, name)]
    held = [owner.get_parameter(key) for owner, key in owners]
    return list({id(parameter): parameter for parameter in held}.values())


def pairs(batch: Any, where: str, argument: str = "batch") -> Iterator[Pair]:
    """The batches (X, y) of a pair or of an iterable of pairs, checked one by one."""
    if batch is None:
        raise ValueError(f"{where}: {argument} must be given, got None")
    if is_pair(batch):
        batch = [batch]
    elif isinstance(batch, Tensor) or not isinstance(batch, Iterable):
        raise TypeError(
            f"{where}: {argument} must be a pair (X, y) of tensors or an iterable of pairs, "
            f"got {type(batch).__name__}"
        )
    empty = True
    for item in batch:
        if not is_pair(item):
            raise TypeError(
                f"{where}: {argument} must hold pairs (X, y) of tensors, got {type(item).__name__}"
            )
        x, y = item
        rows = [len(part) if part.ndim else 0 for part in (x, y)]
        if rows[0] != rows[1]:
            raise ValueError(f"{where}: y must have as many rows as X, {rows[0]}, got {rows[1]}")
        if rows[0] == 0:
            raise ValueError(f"{where}: X must have at least one row, got shape {shape_of(x)}")
        empty = False
        yield x, y
    if empty:
        raise ValueError(f"{where}: {argument} must hold at least one pair, got none")


def is_pair(value: Any) -> bool:
    """Whether it is (X, y); loaders yield lists of two tensors."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, Tensor) for part in value)
    )


def loss_of(subject: Subject, pair: Pair, loss_fn: Loss) -> Tensor:
    """The scalar loss of a batch, on the model's device."""
    device = next(subject.model.parameters()).device
    x, y = (part.to(device) for part in pair)
    output = subject.model(x)
    loss = loss_fn(output, y.to(output.device) if isinstance(output, Tensor) else y)
    if not isinstance(loss, Tensor):
        raise TypeError(f"{subject.where}: loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"{subject.where}: loss_fn must return a scalar, got shape {shape_of(loss)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{subject.where}: loss must depend on a parameter to score, got one without a gradient"
        )
    if not bool(loss.detach().isfinite()):
        raise ValueError(f"{subject.where}: loss must be finite, got {float(loss.detach())}")
    return loss


def gradients(
    scalar: Tensor, leaves: dict[str, list[nn.Parameter]], create_graph: bool = False
) -> dict[str, Tensor]:
    """Name -> derivative in the precision of scores, for the names that the scalar depends on.

    ``.grad`` is not touched, as it would be by ``backward``.
    """
    objects = [parameter for found in leaves.values() for parameter in found]
    if not objects or not scalar.requires_grad:
        return {}
    derivatives = iter(
        torch.autograd.grad(scalar, objects, create_graph=create_graph, allow_unused=True)
    )
    result: dict[str, Tensor] = {}
    for name, found in leaves.items():
        for derivative in islice(derivatives, len(found)):
            if derivative is not None:
                wide = derivative.to(score_dtype(derivative))
                result[name] = result[name] + wide if name in result else wide
    return result


def zeros(subject: Subject) -> dict[str, Tensor]:
    """Name -> zeros of the scores' shape, dtype and device."""
    return {
        name: torch.zeros_like(found[0], dtype=score_dtype(found[0]))
        for name, found in subject.leaves.items()
    }


def mean_gradients(subject: Subject, batch: Any, loss_fn: Loss) -> dict[str, Tensor]:
    """Name -> gradient of the loss, averaged over all rows; 0 where there is none."""
    rows = 0
    with scoring(subject):
        mean = zeros(subject)
        for pair in pairs(batch, subject.where):
            rows += len(pair[0])
            share = len(pair[0]) / rows
            found = gradients(loss_of(subject, pair, loss_fn), subject.leaves)
            for name, total in mean.items():
                total.mul_(1.0 - share)
                if name in found:
                    total.add_(found[name], alpha=share)
    return mean


@contextmanager
def scoring(subject: Subject) -> Iterator[None]:
    """The model as it is scored; everything is as before afterwards, also after an exception."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_data())
        stack.enter_context(_same_random_state(subject.model))
        stack.enter_context(_modes(subject.model))
        stack.enter_context(_own_buffers(subject.model))
        stack.enter_context(_differentiable(subject.leaves))
        if _is_compiled(subject.model):  # compiled code has no second derivative
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng([device.index for device in devices], device_type=kind):
        yield


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but BatchNorm with the statistics of the batch.

    The flags are set one by one, because ``train`` and ``eval`` of a model may do more than that.
    Recurrent layers keep the training mode, without which cuDNN refuses the gradient; only their
    dropout tells the modes apart.
    """
    before = [(module, module.training) for module in model.modules()]
    dropout = [(m, m.dropout) for m, _ in before if isinstance(m, nn.RNNBase)]
    try:
        for module, _ in before:
            module.training = isinstance(module, (_BatchNorm, nn.RNNBase))
        for module, _ in dropout:
            module.dropout = 0.0
        yield
    finally:
        for module, training in before:
            module.training = training
        for module, probability in dropout:
            module.dropout = probability


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Lets the forward write into copies of the buffers."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for module, buffers in before:
            for key, buffer in buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    module._buffers[key] = copies[id(buffer)]
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _differentiable(leaves: dict[str, list[nn.Parameter]]) -> Iterator[None]:
    """Lets frozen parameters have a gradient."""
    frozen = [p for found in leaves.values() for p in found if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in model.modules()
    )
