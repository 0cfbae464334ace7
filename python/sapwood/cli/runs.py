"""The single runs of a comparison: which there are, what they need, how they are kept."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as serialized

from sapwood._files import atomic_write_bytes, atomic_write_text
from sapwood.cli import methods, tasks, training
from sapwood.cli.choices import Variant
from sapwood.cli.methods import Recipe
from sapwood.cli.training import Observer, Run
from sapwood.data import Dataset
from sapwood.pruning import MaskSet

SCHEMA = "sapwood.run/1"
FOLDER = "runs"
_CHECKPOINT_EVERY = 1000  # steps: what an unforeseen end may cost
FROM_DENSE = ("one-shot", "finetune")  # begin with the dense network of the same seed

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training, or one cut; with the lottery ticket, all rounds of one seed."""

    variant: Variant
    arch: str
    recipe: Recipe
    needs: tuple[str, ...] = ()  # names of the results it starts from

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its results, one per sparsity."""
        wanted = (*self.recipe.through, self.recipe.sparsity)
        return tuple(name_of(self.variant, sparsity, self.recipe.seed) for sparsity in wanted)

    @property
    def epochs(self) -> int:
        """Passes over the data that are still to be made once ``needs`` are there."""
        if self.variant.method == "one-shot":
            return 0
        shared = self.recipe.epochs if self.variant.method in FROM_DENSE else 0
        return methods.epochs(self.recipe) - shared

    @property
    def title(self) -> str:
        """For people: method, sparsity, seed."""
        sparsity = f"{100 * self.recipe.sparsity:g} %, " if self.recipe.sparsity else ""
        return f"{self.variant}, {sparsity}seed {self.recipe.seed}"


def name_of(variant: Variant, sparsity: float, seed: int) -> str:
    """What the files of a result are called.

    >>> name_of(Variant.parse("random:snip"), 0.95, 2)
    'random-snip_0.95_seed2'
    """
    method = str(variant).replace(":", "-")
    return f"{method}_seed{seed}" if not sparsity else f"{method}_{sparsity!r}_seed{seed}"


def plan(
    variants: Sequence[Variant], sparsities: Sequence[float], arch: str, recipes: Sequence[Recipe]
) -> list[Job]:
    """The jobs of a comparison, each after those it needs.

    Args:
        variants: the methods; the dense run is made anyway.
        sparsities: rising.
        arch: the network.
        recipes: the dense recipe of every seed.
    """
    dense = Variant.parse("dense")
    jobs = [Job(dense, arch, recipe) for recipe in recipes]
    ordered = sorted((v for v in variants if v != dense), key=lambda v: v.like is not None)
    for variant in ordered:
        for recipe in recipes:
            jobs += _jobs(variant, sparsities, arch, recipe)
    return jobs


def _jobs(variant: Variant, sparsities: Sequence[float], arch: str, dense: Recipe) -> list[Job]:
    base = replace(dense, method=variant.method, scope=variant.scope)
    if variant.method == "lth":
        *through, last = sparsities
        return [Job(variant, arch, replace(base, sparsity=last, through=tuple(through)))]
    needs: tuple[str, ...] = ()
    jobs = []
    for sparsity in sparsities:
        if variant.method in FROM_DENSE:
            needs = (name_of(Variant.parse("dense"), 0.0, dense.seed),)
        elif variant.like is not None:
            needs = (name_of(Variant.parse(variant.like), sparsity, dense.seed),)
        jobs.append(Job(variant, arch, replace(base, sparsity=sparsity), needs))
    return jobs


def run(
    job: Job, dataset: Dataset, folder: Path, observers: Sequence[Observer] = ()
) -> list[Record]:
    """Does a job, or what is left of it, and keeps its results; returns them."""
    runs = _train(job, dataset, folder, observers)
    records = []
    for name, outcome in zip(job.names, runs, strict=True):
        if outcome.masks is None:
            weights = serialized(outcome.model.state_dict())
            atomic_write_bytes(folder / f"{name}.safetensors", weights)
        else:
            outcome.masks.save(folder / f"{name}.masks.safetensors")
        record = _record(job, name, outcome, len(dataset.test_labels))
        # the last file of a run: where it is, the run is done
        atomic_write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
        records.append(record)
    shutil.rmtree(_checkpoint(job, folder), ignore_errors=True)
    return records


def _train(job: Job, dataset: Dataset, folder: Path, observers: Sequence[Observer]) -> list[Run]:
    model = tasks.network(job.arch, dataset, job.recipe.seed)
    method = job.variant.method
    if method in FROM_DENSE:
        model.load_state_dict(load_file(folder / f"{job.needs[0]}.safetensors"))
    if method == "one-shot":
        return [training.cut(job.recipe, dataset, model)]
    like = None
    if job.variant.like is not None:
        like = MaskSet.load(folder / f"{job.needs[0]}.masks.safetensors")
    per_epoch = math.ceil(len(dataset.train_labels) / job.recipe.batch_size)
    return training.train(
        job.recipe,
        dataset,
        model,
        observers=observers,
        like=like,
        trained=method in FROM_DENSE,
        checkpoint=_checkpoint(job, folder),
        checkpoint_every=max(_CHECKPOINT_EVERY, per_epoch),
        resume=True,
    )


def _checkpoint(job: Job, folder: Path) -> Path:
    """A folder of its own for every recipe: an older one's is never taken for it."""
    recipe = json.dumps(asdict(job.recipe), sort_keys=True)
    return folder / f".{job.names[-1]}.{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"


def _record(job: Job, name: str, outcome: Run, images: int) -> Record:
    """The figures of a result as plain data."""
    recipe = outcome.recipe
    lower = tuple(s for s in recipe.through if s < outcome.sparsity)
    reached = replace(recipe, sparsity=outcome.sparsity, through=lower)
    data = training.as_data(outcome)
    wanted = {"sparsity": outcome.sparsity, "sparsity_by_mask": data.pop("sparsity")}
    return {
        "schema": SCHEMA,
        "name": name,
        "method": str(job.variant),
        "seed": recipe.seed,
        **wanted,
        "epochs": methods.epochs(reached),
        "shares": list(job.needs) if job.variant.method in FROM_DENSE else [],
        "arch": job.arch,
        "test_images": images,
        **data,
    }


def stored(job: Job, folder: Path) -> list[Record] | None:
    """The results of a job when all of them are there; None otherwise.

    Raises:
        ValueError: when a file is no result of a run, or the result of another recipe.
    """
    records = []
    for name in job.names:
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        record = read(path)
        # adding a sparsity changes the way of the lottery ticket through all of them
        if record["recipe"].get("through") != list(job.recipe.through):
            return None
        expected = json.loads(json.dumps(asdict(job.recipe)))
        different = [key for key in expected if record["recipe"].get(key) != expected[key]]
        if different or record["arch"] != job.arch:
            key = different[0] if different else "arch"
            raise ValueError(f"{path} must be of the same comparison, got another {key}")
        records.append(record)
    return records


def read(path: Path) -> Record:
    """Reads a stored result.

    Raises:
        ValueError: when it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the result of a run, got {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a result of {SCHEMA}, got another format")
    return record


def faults(record: Record) -> list[str]:
    """What is wrong with the masks of a result; empty when all is exact."""
    if record["masks_digest"] is None:
        return []
    found = []
    if record["zeros"] != record["zeros_expected"]:
        found.append(f"{record['zeros']} zeros instead of {record['zeros_expected']}")
    if not record["masks_and_weights_agree"]:
        found.append("masks and weights disagree")
    if record["left_zero_after_last_update"]:
        found.append(f"{record['left_zero_after_last_update']} masked weights left zero")
    return [f"{record['name']}: {fault}" for fault in found]
