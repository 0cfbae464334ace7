"""The stages of a recipe, the files that let them survive an interruption, and rewinding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sapwood.pruning import _checkpoint, _maskfile
from sapwood.pruning._session import Session, Start, as_bytes, as_tensor
from sapwood.pruning.allocation import LayerPlan
from sapwood.pruning.criteria import Criterion, describe_criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.report import SparsityReport
from sapwood.pruning.schedules import Constant, Schedule
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import (
    BuildPruner,
    Data,
    PruningResult,
    Trainer,
    batches_per_epoch,
    make_average,
)

if TYPE_CHECKING:
    from sapwood.pruning.recipe import Recipe

_RUNNING, _REWIND = "running.safetensors", "rewind.safetensors"
_MODEL, _AVERAGED, _MASKS = "model/", "averaged/", "masks"


class Stages:
    """The stages of one ``fit``, in order; finished ones are read from their files."""

    def __init__(
        self,
        recipe: Recipe,
        where: str,
        described: dict[str, Any],
        model: nn.Module,
        train: Data,
        val: Data,
    ) -> None:
        self.recipe = recipe
        self.where = where
        self.model = model
        self.train = train
        self.val = val
        self.per_epoch = batches_per_epoch(train, recipe.train.batch_size)
        batches_per_epoch(val, recipe.train.batch_size)
        self._index = -1
        setup: dict[str, Any] = {
            "recipe": type(recipe).__name__,
            "train": asdict(recipe.train),
            "batches per epoch": self.per_epoch,
            "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
            "selection": recipe.selection,
            **described,
        }
        self._setup: dict[str, Any] = json.loads(json.dumps(setup))
        self.folder = None if recipe.checkpoint is None else Path(recipe.checkpoint)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = sorted(self.folder.glob("*.safetensors"))
            if found and not recipe.resume:
                raise ValueError(
                    f"{self.where}: checkpoint must be a folder without an earlier run, got "
                    f"{found[0].name} in {self.folder}; use resume=True or another folder"
                )

    def run(
        self,
        name: str,
        build: BuildPruner,
        *,
        config: TrainConfig | None = None,
        prepare: Callable[[], None] | None = None,
        start: Start | None = None,
        after_step: Callable[[Session], None] | None = None,
    ) -> PruningResult:
        """The next stage: read, resumed or trained.

        Args:
            name: shown with the progress.
            build: makes the pruner.
            config: default: the recipe's.
            prepare: changes the model before the stage's first step.
            start: where in the training the stage begins.
            after_step: sees the session after every step.
        """
        self._index += 1
        config = config or self.recipe.train
        kept = self._read(self._file(f"stage-{self._index:02d}.safetensors"))
        if kept is not None:
            return self._restored(name, config, *kept)
        keeper = None if self.folder is None else _Keeper(self, self._index)
        if prepare is not None and (keeper is None or keeper.load() is None):
            with torch.no_grad():
                prepare()
        trainer = Trainer(
            config,
            loss_fn=self.recipe.loss_fn,
            metric=self.recipe.metric,
            progress=self.recipe.progress,
            stage=name,
            keeper=keeper,
            after_step=after_step,
        )
        result = trainer.fit(self.model, self.train, self.val, build, start)
        self._write_finished(result)
        return result

    def cut(self, name: str, masks: MaskSet) -> PruningResult:
        """A stage without training: the masks are applied, and the metric is taken."""
        masks.apply_(self.model)
        config = self.recipe.train
        trainer = Trainer(config, metric=self.recipe.metric, stage=name)
        sparsity = masks.sparsity()
        row = {"step": 0, "epoch": 0, "loss": float("nan"), "lr": 0.0}
        row |= {"metric": trainer.evaluate(self.model.to(trainer.device), self.val)}
        row |= {"target_sparsity": sparsity, "sparsity": sparsity}
        report = SparsityReport.of(self.model, masks)
        return PruningResult(self.model, masks, [row], report, config, 0.0, 0, stage=name)

    def rewind_point(self, step: int) -> RewindPoint:
        """The weights and the place in the data after ``step`` steps of the first stage."""
        point = RewindPoint(step, self._save_point)
        kept = self._read(self._file(_REWIND))
        if kept is not None:
            point.weights, point.start = kept[1], Start.from_manifest(kept[0]["start"])
        elif step == 0:
            point.take(self.model, Start())
        return point

    def _save_point(self, point: RewindPoint) -> None:
        path = self._file(_REWIND)
        if path is not None:
            self._write(path, {"start": point.start.to_manifest()}, point.weights)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _read(self, path: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if path is None or not path.is_file():
            return None
        manifest, tensors = _checkpoint.read(path, self.where)
        there = manifest.get("setup")
        if there != self._setup:
            difference = _first_difference(there, self._setup)
            raise ValueError(f"{self.where}: {path} must be of the same run, got {difference}")
        return manifest, tensors

    def _write(self, path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        _checkpoint.write(path, {"setup": self._setup, **manifest}, tensors)

    def _write_finished(self, result: PruningResult) -> None:
        path = self._file(f"stage-{self._index:02d}.safetensors")
        if path is None:
            return
        tensors = _checkpoint.with_prefix(_MODEL, result.model.state_dict())
        if result.masks is not None:
            content = _maskfile.encode(result.masks, result.masks.aliases, {})
            tensors[_MASKS] = as_tensor(content)
        if result.averaged is not None:
            tensors |= _checkpoint.with_prefix(_AVERAGED, result.averaged.state_dict())
        manifest = {
            "stage": result.stage,
            "history": result.history,
            "wall_s": result.wall_s,
            "steps": result.steps,
        }
        self._write(path, manifest, tensors)
        path.with_name(_RUNNING).unlink(missing_ok=True)

    def _restored(
        self, name: str, config: TrainConfig, manifest: dict[str, Any], tensors: dict[str, Tensor]
    ) -> PruningResult:
        self.model.to(config.resolve_device())
        self.model.load_state_dict(_checkpoint.without_prefix(_MODEL, tensors))
        masks = report = None
        if _MASKS in tensors:
            decoded, aliases, _ = _maskfile.decode(as_bytes(tensors[_MASKS]))
            masks = MaskSet(decoded, aliases=aliases).to(config.resolve_device())
            report = SparsityReport.of(self.model, masks)
        averaged = make_average(self.model, config)
        if averaged is not None:
            averaged.load_state_dict(_checkpoint.without_prefix(_AVERAGED, tensors))
        return PruningResult(
            model=self.model,
            masks=masks,
            history=manifest["history"],
            report=report,
            config=config,
            wall_s=manifest["wall_s"],
            steps=manifest["steps"],
            averaged=averaged,
            stage=name,
        )


class RewindPoint:
    """A state of the weights that later stages begin from."""

    def __init__(self, step: int, save: Callable[[RewindPoint], None]) -> None:
        self.step = step
        self.weights: dict[str, Tensor] = {}
        self.start = Start(step)
        self._save = save

    def take(self, model: nn.Module, start: Start) -> None:
        """Remembers the model as it is now."""
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.start = start
        self._save(self)

    def after_step(self, session: Session) -> None:
        """Takes the state when its step has come."""
        if session.step == self.step:
            self.take(session.model, session.position)

    def restore(self, model: nn.Module) -> None:
        """Sets the weights and buffers back."""
        model.load_state_dict(self.weights)


class _Keeper:
    """The checkpoint of the running stage."""

    def __init__(self, stages: Stages, index: int) -> None:
        self.every = stages.recipe.checkpoint_every
        self._stages = stages
        self._index = index
        assert stages.folder is not None
        self._path = stages.folder / _RUNNING

    def save(self, session: Session) -> None:
        manifest, tensors = session.capture()
        self._stages._write(self._path, {"index": self._index, **manifest}, tensors)

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        kept = self._stages._read(self._path)
        return kept if kept is not None and kept[0]["index"] == self._index else None


def _first_difference(there: Any, here: Any) -> str:
    """Where two descriptions of a run differ first, in words."""
    name = ""
    while isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *there]
        key = next(key for key in keys if there.get(key) != here.get(key))
        name = f"{name}.{key}" if name else key
        there, here = there.get(key), here.get(key)
    return f"{name} = {there!r} instead of {here!r}"


def holding(masks: MaskSet) -> BuildPruner:
    """For a stage with given masks."""

    def build(model: nn.Module, total_steps: int, epoch_steps: int) -> Pruner:
        return Pruner(model, Constant(masks.sparsity()), masks=masks)

    return build


def describe_scope(scope: str | LayerPlan) -> Any:
    """A scope as JSON values."""
    return dict(scope) if isinstance(scope, LayerPlan) else scope


def describe_schedule(schedule: str | Schedule) -> Any:
    """A schedule as JSON values."""
    return schedule.state_dict() if isinstance(schedule, Schedule) else schedule


def describe_rule(criterion: str | Criterion) -> Any:
    """A criterion as JSON values; the class alone where that is all that can be written down."""
    if isinstance(criterion, str):
        return criterion
    return describe_criterion(criterion) or type(criterion).__name__
