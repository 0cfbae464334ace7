"""Files of minimized networks: safetensors with a manifest that rebuilds the modules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood._files import atomic_write_bytes, read_tensors
from sapwood.minimize.adapters import AttentionCall
from sapwood.minimize.modules import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
    OutputScatter,
    RaggedAttention,
)
from sapwood.minimize.report import MinimizeReport
from sapwood.minimize.surgery import guard_fast_paths, refresh

__all__ = ["load", "save"]

_FORMAT = "sapwood.minimized/1"
_CONVOLUTION = (
    "in_channels out_channels kernel_size stride padding dilation groups padding_mode bias"
)
_BATCH_NORM = "num_features eps momentum affine track_running_stats"

#: The modules that surgery resizes or creates, with the arguments that build them again.
_ARGUMENTS: dict[type[nn.Module], str] = {
    nn.Linear: "in_features out_features bias",
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: f"{_CONVOLUTION} output_padding",
    nn.ConvTranspose2d: f"{_CONVOLUTION} output_padding",
    nn.ConvTranspose3d: f"{_CONVOLUTION} output_padding",
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.InstanceNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.PReLU: "num_parameters",
    BorderBias2d: _CONVOLUTION,
    AppendOnes: "",
    nn.Identity: "",  # in the place of a layer that was multiplied out
    InputSelect: "index dim",
    OutputScatter: "index width dim bias",
    CompensatedLayerNorm: "kept total eps elementwise_affine bias tail channels_first",
    CompensatedRMSNorm: "kept total eps elementwise_affine tail",
    CompensatedGroupNorm: "groups kept total eps affine",
    RaggedAttention: (
        "query_width out_width heads qk_width v_width scale key_width value_width kv_of_head "
        "bias out_bias batch_first dropout"
    ),
}
_BY_NAME = {kind.__name__: kind for kind in _ARGUMENTS}
#: What surgery puts before or behind a layer, with which it forms an ``nn.Sequential``.
_AROUND = (InputSelect, AppendOnes, OutputScatter)


def save(
    model: nn.Module, path: str | os.PathLike[str], *, report: MinimizeReport | None = None
) -> None:
    """Writes a minimized network: its tensors, and how to rebuild the modules that hold them.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from sapwood.minimize import load, minimize, save
        >>> def make():
        ...     return torch.nn.Sequential(
        ...         torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ...     )
        >>> model = make().eval()
        >>> _ = model[2].weight.data[:, 1].zero_()
        >>> small, report = minimize(model, torch.randn(2, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(small, Path(folder) / "small.safetensors", report=report)
        ...     again = load(Path(folder) / "small.safetensors", make)
        >>> again[0].out_features
        2

    Args:
        model: the network that ``minimize`` returned, trained further or not.
        path: the target file, written whole or not at all.
        report: stored beside, with the promises under which the network is exact.

    Raises:
        OSError: if the folder is missing or not writable.
    """
    modules = {}
    for name, module in model.named_modules():
        described = _described(module)
        if described is not None:
            modules[name] = described
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    metadata = {"format": _FORMAT, "modules": json.dumps(modules)}
    if report is not None:
        metadata["report"] = json.dumps(report.to_dict())
    atomic_write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def load(path: str | os.PathLike[str], model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Reads a minimized network.

    Example:
        >>> small = load("small.safetensors", make_model)  # doctest: +SKIP

    Args:
        path: a file that ``save`` wrote.
        model_fn: builds the network as it was before minimization; its weights do not matter.

    Returns:
        The minimized network in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no minimized network, or one of another model.
    """
    where = "minimize.load"
    if not Path(path).exists():
        raise FileNotFoundError(f"sapwood.{where}: path must exist, got {path}")
    metadata, tensors = _read(path)
    if metadata.get("format") != _FORMAT:
        _check.fail(ValueError, where, "path", f"hold a {_FORMAT}", metadata.get("format"))
    model = model_fn()
    try:
        modules: dict[str, dict[str, Any]] = json.loads(metadata["modules"])
        for name in sorted(modules, key=lambda name: name.count(".")):
            _rebuild(model, name, modules[name], tensors)
        _reshape(model, tensors)
        model.load_state_dict(tensors, assign=True)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"sapwood.{where}: model_fn must build the network that was minimized, got a model "
            f"that {path} does not fit: {reason}"
        ) from error
    guard_fast_paths(model)
    return model.eval()


def _read(path: str | os.PathLike[str]) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"sapwood.minimize.load: path must be a safetensors file, got {path}: {error}"
        ) from None


def _described(module: nn.Module) -> dict[str, Any] | None:
    members = list(module) if type(module) is nn.Sequential else []
    if len(members) in (2, 3) and any(type(member) in _AROUND for member in members):
        return {"type": "Sequential", "members": len(members)}
    if type(module) is AttentionCall:
        remembered = {name: getattr(module, name) for name in ("sources", "causal", "outputs")}
        return {"type": "AttentionCall", **remembered}
    if type(module) not in _ARGUMENTS:
        return None
    names = _ARGUMENTS[type(module)].split()
    return {"type": type(module).__name__, **{name: _argument(module, name) for name in names}}


def _argument(module: Any, name: str) -> Any:
    """A constructor's argument as the module remembers it."""
    if isinstance(module, RaggedAttention):
        layers = {
            "query_width": module.q_proj.in_features,
            "key_width": module.k_proj.in_features,
            "value_width": module.v_proj.in_features,
            "out_width": module.out_proj.out_features,
            "bias": module.q_proj.bias is not None,
            "out_bias": module.out_proj.bias is not None,
        }
        if name in layers:
            return layers[name]
    if name == "bias":
        return module.bias is not None
    if name in ("elementwise_affine", "affine"):
        return module.weight is not None
    value = getattr(module, name)
    return value.numel() if isinstance(value, Tensor) else value


def _rebuild(
    model: nn.Module, path: str, described: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    arguments = dict(described)
    kind = arguments.pop("type")
    if kind == "Sequential":
        # Its members follow, under names that nn.Sequential does not have yet.
        members = arguments.get("members", 2)  # as many as early files always had
        if members not in (2, 3):
            raise ValueError(f"{path} has {members} members")
        model.set_submodule(path, nn.Sequential(*(nn.Identity() for _ in range(members))))
        return
    if kind == "AttentionCall":
        model.set_submodule(path, _empty_call(arguments))
        return
    made = _BY_NAME[kind]
    if path == "":
        _resize(model, made, arguments)
        return
    old = model.get_submodule(path)
    if issubclass(made, (InputSelect, OutputScatter)):
        new: nn.Module = _indexed(made, arguments, tensors, path)
    elif made is AppendOnes:
        new = AppendOnes()
    elif made is nn.PReLU:
        new = nn.PReLU(arguments["num_parameters"], device="meta")
    else:
        new = made(**_tuples(arguments), device="meta")
    model.set_submodule(path, new.train(old.training))


def _indexed(
    kind: type[InputSelect | OutputScatter],
    arguments: dict[str, Any],
    tensors: Mapping[str, Tensor],
    path: str,
) -> nn.Module:
    """Its tensors are as long as the file says, and not as the manifest."""
    index = tensors[f"{path}.index"]
    if index.numel() != arguments.pop("index"):
        raise ValueError(f"{path}.index has another length")
    if not issubclass(kind, OutputScatter):
        return kind(index, **arguments)
    if arguments["bias"] and tensors[f"{path}.bias"].numel() != arguments["width"]:
        raise ValueError(f"{path}.bias has another length")
    return kind(index, **arguments, device="meta")


def _empty_call(arguments: dict[str, Any]) -> AttentionCall:
    """The attention itself follows in the manifest."""
    empty = RaggedAttention(1, 1, heads=1, qk_width=1, v_width=1, scale=1.0, device="meta")
    return AttentionCall(empty, **_tuples(arguments))


def _resize(model: nn.Module, kind: type[nn.Module], arguments: dict[str, Any]) -> None:
    """A network that is a single layer cannot be replaced in itself."""
    if type(model) is not kind:
        raise ValueError(f"a single {kind.__name__} was saved")
    for name, value in _tuples(arguments).items():
        if name not in ("bias", "affine"):
            setattr(model, name, value)


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


def _reshape(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters outside of the known modules the shapes of the file."""
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.get(key)
        if parameter is not None and parameter.shape != tensor.shape:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            refresh(module)
