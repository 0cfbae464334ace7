"""``sapwood mask``: look at mask files, compare them, apply them, make them from checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapwood.cli import console

if TYPE_CHECKING:
    from torch import Tensor

    from sapwood.pruning import MaskSet

app = typer.Typer(help="Inspect, compare, apply and make mask files.", no_args_is_help=True)

MaskFile = Annotated[Path, typer.Argument(help="Mask file (*.masks.safetensors).")]
Checkpoint = Annotated[Path, typer.Argument(help="Weights in a safetensors file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Source(str, Enum):
    """Whose way of storing masks a checkpoint follows."""

    torch_prune = "torch-prune"
    torchao = "torchao"


@app.command("inspect")
def inspect(file: MaskFile, as_json: Json = False) -> None:
    """Show what a mask file keeps, tensor by tensor."""
    masks = _load_masks(file)
    counts = masks.counts()
    if as_json:
        tensors = {
            name: {"shape": list(masks[name].shape), "kept": kept, "total": total}
            for name, (kept, total) in counts.items()
        }
        facts = {"sparsity": masks.sparsity(), "digest": masks.digest(), "aliases": masks.aliases}
        console.print_json({**facts, "metadata": masks.metadata, "tensors": tensors})
        return
    rows = [
        [name, _shape(masks[name]), f"{kept:,}", f"{total:,}", _percent(kept, total)]
        for name, (kept, total) in counts.items()
    ]
    kept, total = (sum(pair[i] for pair in counts.values()) for i in range(2))
    rows.append(["all", "", f"{kept:,}", f"{total:,}", _percent(kept, total)])
    out = console.stdout()
    out.print(console.table("", ["tensor", "shape", "kept", "of", "sparsity"], rows))
    for alias, name in masks.aliases.items():
        out.print(f"{alias} is tied to {name}", markup=False)
    for key, value in masks.metadata.items():
        out.print(f"{key}: {value}", markup=False)
    out.print(f"digest {masks.digest()}", markup=False)


@app.command("diff")
def diff(first: MaskFile, second: MaskFile, as_json: Json = False) -> None:
    """Compare two mask files of the same model."""
    a, b = _load_masks(first), _load_masks(second)
    with _reported():
        both, either = (a & b).counts(), (a | b).counts()
        jaccard, corrected = a.overlap(b), a.overlap(b, kind="chance_corrected")
    mine, theirs = a.counts(), b.counts()
    if as_json:
        tensors = {
            name: {
                "both": both[name][0],
                "only_first": mine[name][0] - both[name][0],
                "only_second": theirs[name][0] - both[name][0],
            }
            for name in mine
        }
        summary = {"equal": a.digest() == b.digest(), "jaccard": jaccard}
        console.print_json({**summary, "chance_corrected": corrected, "tensors": tensors})
        return
    rows = [
        [
            name,
            f"{both[name][0]:,}",
            f"{mine[name][0] - both[name][0]:,}",
            f"{theirs[name][0] - both[name][0]:,}",
            f"{both[name][0] / either[name][0]:.3f}" if either[name][0] else "-",
        ]
        for name in mine
    ]
    out = console.stdout()
    heads = ["tensor", "kept in both", "only first", "only second", "jaccard"]
    out.print(console.table("", heads, rows))
    verdict = "the same masks" if a.digest() == b.digest() else f"overlap {jaccard:.3f} (jaccard)"
    out.print(f"{verdict}, {corrected:.3f} above chance (0 is chance, 1 the most possible)")


@app.command("apply")
def apply(file: MaskFile, checkpoint: Checkpoint, out: Checkpoint) -> None:
    """Set the masked weights of a checkpoint to zero and write the result to OUT."""
    masks = _load_masks(file)
    tensors, metadata = _load_checkpoint(checkpoint)
    changed = 0
    for name, mask in masks.items():
        if name not in tensors:
            console.fail(f"{checkpoint} has no tensor {name!r}, which {file} masks", 2)
        if tensors[name].shape != mask.shape:
            shapes = f"{_shape(tensors[name])} in {checkpoint}, {_shape(mask)} in {file}"
            console.fail(f"{name} must have one shape, got {shapes}", 2)
        for key in (name, *(alias for alias, tied in masks.aliases.items() if tied == name)):
            if key in tensors:
                changed += int(((tensors[key] != 0) & ~mask).sum())
                tensors[key] = tensors[key].masked_fill(~mask, 0)
    _save_checkpoint(out, tensors, metadata)
    message = f"wrote {out}: {changed:,} weights set to zero, sparsity {masks.sparsity():.2%}"
    console.stdout().print(message, markup=False, soft_wrap=True)


@app.command("from-zeros")
def from_zeros(
    checkpoint: Checkpoint,
    out: MaskFile,
    include: Annotated[
        str, typer.Option(help="Glob of the tensors to take; those of two dimensions or more.")
    ] = "*weight",
) -> None:
    """Make a mask file that keeps what is not zero in a checkpoint."""
    from sapwood.pruning import MaskSet

    tensors, _ = _load_checkpoint(checkpoint)
    chosen = {
        name: tensor != 0
        for name, tensor in tensors.items()
        if fnmatchcase(name, include) and tensor.dim() >= 2 and tensor.is_floating_point()
    }
    if not chosen:
        console.fail(f"no floating tensor of {checkpoint} matches --include {include!r}", 2)
    for name in chosen:
        if tensors[name].isnan().any():
            console.fail(f"{name} in {checkpoint} must hold numbers, got NaN", 2)
    masks = MaskSet(chosen)
    _save_masks(masks, out)
    message = f"wrote {out}: {len(masks)} tensors, sparsity {masks.sparsity():.2%}"
    console.stdout().print(message, markup=False, soft_wrap=True)


@app.command("convert")
def convert(
    checkpoint: Checkpoint,
    out: Checkpoint,
    source: Annotated[Source, typer.Option("--from", help="Which tool wrote the checkpoint.")],
) -> None:
    """Split a checkpoint that holds masks into plain weights and a mask file beside them."""
    from sapwood.pruning import from_torch_prune, from_torchao

    tensors, metadata = _load_checkpoint(checkpoint)
    read = from_torch_prune if source is Source.torch_prune else from_torchao
    with _reported():
        masks, plain = read(tensors)
    if not masks:
        console.fail(f"{checkpoint} holds no masks in the way of {source.value}", 2)
    mask_file = out.with_name(f"{out.name.removesuffix('.safetensors')}.masks.safetensors")
    _save_checkpoint(out, plain, metadata)
    _save_masks(masks, mask_file)
    message = f"wrote {out} and {mask_file}: sparsity {masks.sparsity():.2%}"
    console.stdout().print(message, markup=False, soft_wrap=True)


def _load_masks(path: Path) -> MaskSet:
    from sapwood.pruning import MaskSet

    with _reported():
        return MaskSet.load(path)


def _load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from sapwood._files import read_tensors

    with _reported():
        try:
            metadata, tensors = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{path} must be an intact safetensors file: {error}") from None
        return tensors, metadata


def _save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    from sapwood._files import atomic_write_bytes

    with _reported():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write_bytes(path, save(contiguous, metadata=metadata or None))


def _save_masks(masks: MaskSet, path: Path) -> None:
    with _reported():
        masks.save(path)


@contextmanager
def _reported() -> Iterator[None]:
    """Turns the errors of reading, writing and comparing into one line and an exit code."""
    try:
        yield
    except FileNotFoundError as error:
        console.fail(f"{error.filename or error} does not exist", console.MISSING_DATA)
    except (ValueError, TypeError, OSError) as error:
        console.fail(str(error), console.BAD_ARGUMENTS)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _percent(kept: int, total: int) -> str:
    return f"{1 - kept / total:.2%}" if total else "-"
