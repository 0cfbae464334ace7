"""Every reader of files that the package has, with intact files to begin from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from sapwood._files import read_tensors
from sapwood.cli import checkpoints
from sapwood.data import load_cifar10, load_mnist, mnist
from sapwood.data.idx import read_idx
from sapwood.gaussian import GaussianField, _field_file
from sapwood.gaussian.images import as_image
from sapwood.minimize import Plan, analyze, minimize
from sapwood.minimize import load as load_minimized
from sapwood.minimize import save as save_minimized
from sapwood.minimize._cycle import Cycle, Store, Subject
from sapwood.ops import _dispatch
from sapwood.ops._cost_model import DispatchTable, Key
from sapwood.pruning import (
    Cubic,
    LayerPlan,
    MaskMatchError,
    MaskSet,
    Pruner,
    _checkpoint,
    _container,
    _maskfile,
)
from tests.dispatch.tables import table
from tests.fuzz import data_files
from tests.fuzz.mutators import Repair, joined

_SETUP = {"cycles": 1}


@dataclass(frozen=True)
class Reader:
    """One reader: it raises ``errors`` for a damaged file, and nothing else.

    ``prepare`` makes the other files of a folder; the fuzzed one has the name ``file`` in it.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...] = (ValueError,)
    file: str = "input"
    prepare: Callable[[Path], object] | None = None
    repair: Repair | None = None
    largest: int = 0  # bytes that a small file may unpack to, where its format compresses
    seconds: float = 1.0  # for one file


def saved(save: Callable[[Path], object]) -> bytes:
    """What a writer writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save(path)
        return path.read_bytes()


# pruning ------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))


def _masks() -> MaskSet:
    return MaskSet({"0.weight": torch.rand(3, 5) < 0.5, "2.weight": torch.rand(2, 3) < 0.5})


def _mask_files() -> list[bytes]:
    tied = MaskSet(
        {"a": torch.ones(9, dtype=torch.bool)}, aliases={"b": "a"}, metadata={"run": "7"}
    )
    empty = MaskSet({"e": torch.ones(0, 4, dtype=torch.bool), "s": torch.tensor(True)})
    return [saved(m.save) for m in (_masks(), tied, empty)]


def _repair_container(header: dict[str, Any], data: bytes) -> None:
    """Digest and checksum of what the header says."""
    metadata = header["__metadata__"]
    tensors, offset = {}, 0
    for name in sorted(set(header) - {"__metadata__"}):
        size = header[name]["shape"][0]
        tensors[name] = np.frombuffer(data, np.uint8, size, offset)
        offset += size
    if "digest" in metadata:
        metadata["digest"] = _maskfile.digest(
            _container.unpack_all(tensors, metadata.get("shapes"))
        )
    metadata.pop(_container.CHECKSUM, None)
    metadata[_container.CHECKSUM] = _container._checksum(metadata, tensors)


def _pruner_files() -> list[bytes]:
    pruner = Pruner(network(), Cubic(0.5, t1=4, every=1), "magnitude")
    return [saved(pruner.save)]


def _plans() -> list[bytes]:
    return [saved(LayerPlan({"0.weight": 0.5, "2": 0.25}).save)]


def _checkpoints() -> list[bytes]:
    tensors = {"model/a": torch.rand(3, 2), "n": torch.tensor(3), "h": torch.rand(2).half()}
    return [saved(lambda path: _checkpoint.write(path, {"index": 0, "setup": {}}, tensors))]


def _repair_checkpoint(header: dict[str, Any], data: bytes) -> None:
    metadata = header["__metadata__"]
    tensors = safetensors.torch.load(joined(header, data))
    metadata["digest"] = _checkpoint._digest(metadata["manifest"], tensors)


# Gaussian images ----------------------------------------------------------------------------------


def _fields() -> list[bytes]:
    mu, chol = torch.rand(4, 2) * 5, torch.tensor([[1.0, 0.1, 1.0]]).repeat(4, 1)
    field = GaussianField(mu, chol, torch.rand(4, 3), height=6, width=7)
    none = GaussianField(mu[:0], chol[:0], torch.rand(0, 1), height=1, width=1, mode="norm")
    return [field._encoded(False), field._encoded(True), none._encoded(False)]


def _repair_field(header: dict[str, Any], data: bytes) -> None:
    metadata = header["__metadata__"]
    metadata.pop("checksum", None)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    metadata["checksum"] = _field_file._checksum(metadata, entries, data)


# minimized networks -------------------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 2, 1)
    )


def _cut(model: nn.Module) -> nn.Module:
    model.eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[0].zero_()
            parameter.data[:, -1].zero_()
    return model


def _minimized() -> list[bytes]:
    small, report = minimize(_cut(convolutions()), torch.randn(1, 2, 4, 4))
    return [saved(lambda path: save_minimized(small, path, report=report))]


def _minimized_perceptrons() -> list[bytes]:
    small, report = minimize(_cut(network()), torch.randn(1, 5))
    return [
        saved(lambda path: save_minimized(small, path, report=report)),
        saved(lambda path: save_minimized(small, path)),
    ]


class Residual(nn.Module):
    """A branch that reads and writes few channels of a stream, once it is minimized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.head = nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.branch.weight.data[3:].zero_()
        self.branch.weight.data[:, 3:].zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        result: Tensor = self.head(y + self.branch(y))
        return result


def _minimized_residuals() -> list[bytes]:
    small, report = minimize(Residual().eval(), torch.randn(1, 3))
    assert len(small.branch) == 3  # type: ignore[arg-type]
    return [saved(lambda path: save_minimized(small, path, report=report))]


def _minimize_plans() -> list[bytes]:
    return [analyze(_cut(network()), torch.randn(1, 5)).to_json().encode()]


def _keep_run(folder: Path) -> None:
    """The folder of a run of one cycle."""
    store = Store(folder, _SETUP, True)
    model = network()
    subject = Subject(model, Cycle(0, 26, 104, 21, 21, 0.0, 0.5), 21, None)
    store.save(subject, model, None)
    small, report = minimize(_cut(network()), torch.randn(1, 5))
    subject.cycles.append(Cycle.of(1, small, report, 0.5, None))
    store.save(subject, small, report)


def _kept(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            _keep_run(Path(folder))
            return [(Path(folder) / name).read_bytes()]

    return seeds


def _resume(path: Path) -> object:
    return Store(path.parent, _SETUP, True).load(network(), network)


# tables and states in JSON ------------------------------------------------------------------------


def _tables() -> list[bytes]:
    return [table().to_json().encode()]


def _in_cache(read: Callable[[], object]) -> Callable[[Path], object]:
    """Reads the cache file of the folder; it never raises, it warns and measures anew."""

    def inner(path: Path) -> object:
        before = os.environ.get("SAPWOOD_CACHE_DIR")
        os.environ["SAPWOOD_CACHE_DIR"] = str(path.parent)
        _dispatch._warned.clear()
        try:
            found = read()
        finally:
            os.environ.pop("SAPWOOD_CACHE_DIR")
            if before is not None:
                os.environ["SAPWOOD_CACHE_DIR"] = before
        if _dispatch._warned:
            raise ValueError(next(iter(_dispatch._warned)))
        return found

    return inner


def _caches() -> list[bytes]:
    def save(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SAPWOOD_CACHE_DIR"] = folder
            _dispatch._write_cache({Key("cpu", "avx512", "float32", 1): table()})
            path.write_bytes(_dispatch.cache_file().read_bytes())
            os.environ.pop("SAPWOOD_CACHE_DIR")

    return [saved(save)]


def _command_checkpoints() -> list[bytes]:
    tensors: dict[str, Tensor] = {"0.weight": torch.rand(3, 5), "b": torch.rand(2).bfloat16()}
    return [safetensors.torch.save(tensors, metadata={"a": "b"})]


def _states() -> list[bytes]:
    return [json.dumps({"command": "prune", "arch": "mlp", "seed": 0}).encode()]


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("mask_file", MaskSet.load, _mask_files, repair=_repair_container),
        Reader(
            "pruner_file",
            lambda path: Pruner.load(path, network()),
            _pruner_files,
            (ValueError, MaskMatchError),
            repair=_repair_container,
        ),
        Reader("layer_plan", LayerPlan.load, _plans),
        Reader(
            "training_checkpoint",
            lambda path: _checkpoint.read(path, "read"),
            _checkpoints,
            repair=_repair_checkpoint,
        ),
        Reader("gaussian_field", GaussianField.load, _fields, repair=_repair_field),
        Reader("image", as_image, data_files.images, largest=2 << 30, seconds=5.0),
        Reader("minimized_convolutions", lambda p: load_minimized(p, convolutions), _minimized),
        Reader(
            "minimized_perceptron", lambda p: load_minimized(p, network), _minimized_perceptrons
        ),
        Reader("minimized_residual", lambda p: load_minimized(p, Residual), _minimized_residuals),
        Reader("minimize_plan", lambda p: Plan.from_json(p.read_text("utf-8")), _minimize_plans),
        Reader(
            "squeeze_release_state",
            _resume,
            _kept("squeeze_release.json"),
            file="squeeze_release.json",
            prepare=_keep_run,
        ),
        Reader(
            "squeeze_release_weights",
            _resume,
            _kept("dense.safetensors"),
            file="dense.safetensors",
            prepare=_keep_run,
        ),
        Reader("idx", read_idx, data_files.idx_files),
        Reader(
            "mnist",
            lambda path: load_mnist(path.parent),
            data_files.mnist_images,
            file=mnist.FILES[0],
            prepare=data_files.mnist_folder,
        ),
        Reader(
            "cifar10_binary",
            lambda path: load_cifar10(path.parent),
            data_files.binary_batches,
            file="data_batch_1.bin",
            prepare=data_files.cifar_folder("binary"),
        ),
        Reader(
            "cifar10_python",
            lambda path: load_cifar10(path.parent),
            data_files.python_batches,
            file="data_batch_1",
            prepare=data_files.cifar_folder("Python"),
        ),
        Reader(
            "cifar10_jpeg", load_cifar10, data_files.jpeg_archives, (ValueError, FileNotFoundError)
        ),
        Reader("dispatch_table", lambda p: DispatchTable.from_json(p.read_text("utf-8")), _tables),
        Reader(
            "dispatch_cache",
            _in_cache(_dispatch._read_cache),
            _caches,
            file=_dispatch.cache_file().name,
        ),
        Reader("command_checkpoint", read_tensors, _command_checkpoints),
        Reader("command_state", checkpoints._read, _states),
    )
}
