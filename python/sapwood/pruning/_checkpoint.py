"""Checkpoints of training runs: one safetensors file with a manifest and a digest, no pickle.

A single file is replaced by a single rename, so a crash leaves the old checkpoint or the new one
and never parts of both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood._files import atomic_write_bytes, read_tensors

__all__ = ["read", "write"]

FORMAT = "sapwood.checkpoint/1"
_OPTIMIZER = "optimizer/"

Manifest = dict[str, Any]
Tensors = dict[str, Tensor]


def write(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a checkpoint atomically; tensors that share memory are stored apart."""
    stored = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    text = json.dumps(dict(manifest))
    metadata = {"format": FORMAT, "manifest": text, "digest": _digest(text, stored)}
    atomic_write_bytes(path, serialized(stored, metadata=metadata))


def read(path: str | os.PathLike[str], where: str) -> tuple[Manifest, Tensors]:
    """Manifest and tensors (on the CPU) of a checkpoint, verified by its digest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, truncated or altered.
    """
    try:
        # the file is read whole before anything is verified, so that it cannot change in between
        metadata, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{where}: {path} must be an intact checkpoint: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{where}: {path} must be a checkpoint of format {FORMAT!r}, "
            f"got {metadata.get('format')!r}"
        )
    text = metadata.get("manifest", "")
    if metadata.get("digest") != _digest(text, tensors):
        raise ValueError(f"{where}: {path} must be an intact checkpoint, got another digest")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} must be an intact checkpoint: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{where}: {path} must be an intact checkpoint, got no manifest")
    return manifest, tensors


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the manifest and, by name, the type, shape and bytes of every tensor."""
    hashed = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        value = tensors[name]
        hashed.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        hashed.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under names that start with ``prefix``."""
    return {prefix + name: value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of ``with_prefix``; tensors with other names are left out."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[Manifest, Tensors]:
    """The state by parameter name: what is no tensor, and the tensors."""
    values: Manifest = {}
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}/{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    return values, tensors


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, values: Manifest, tensors: Tensors
) -> None:
    """The inverse of ``optimizer_state``, on an optimizer made in the same way."""
    by_name: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values.items()}
    for path, value in without_prefix(_OPTIMIZER, tensors).items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {index: by_name[name] for index, name in enumerate(order) if name in by_name}
    # torch moves every entry to the device and dtype that its optimizer wants
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
