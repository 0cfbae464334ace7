"""Selection over shards equals that of one process, and all ranks raise the same errors."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp

from sapwood.pruning import LayerPlan, MaskSet, select

if not dist.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

Scores = dict[str, Tensor]

#: Rows that do not divide by the ranks, fewer rows than ranks, and none.
SHAPES = {"a": (7, 5), "b": (1, 9), "c": (5, 4, 3, 3), "d": (3,), "e": (0, 4), "f": (10, 6)}
PLAN = LayerPlan({"a": 0.2, "b": 0.0, "c": 0.8, "d": 0.5, "e": 0.5, "f": 0.4})


def on_ranks(world: int, body: Callable[[int], None], folder: Path) -> None:
    """Runs ``body(rank)`` in gloo processes; fails with the first of their tracebacks."""
    # a server imports torch once and forks the ranks, which is much faster than to spawn them
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "sapwood.pruning"])
    arguments = (world, body, str(folder / "store"))
    mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, body: Callable[[int], None], store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        *("gloo", f"file://{store}"),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        body(rank)
    finally:
        dist.destroy_process_group()


def tied_scores(seed: int, dtype: torch.dtype = torch.float32) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-3, 4, shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def masks_for(scores: Scores, seed: int | None) -> MaskSet:
    """Dense masks, or random ones of density 0.8."""
    generator = torch.Generator().manual_seed(seed or 0)
    return MaskSet(
        {
            name: torch.rand(s.shape, generator=generator) < 0.8
            if seed
            else torch.ones(s.shape, dtype=torch.bool)
            for name, s in scores.items()
        }
    )


def distributed(
    tensors: dict[str, Tensor] | MaskSet, mesh: DeviceMesh, placements: Sequence[Placement]
) -> Scores:
    return {name: distribute_tensor(t, mesh, placements) for name, t in tensors.items()}


def check_equal(
    scores: Scores,
    masks: MaskSet,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    sparsity: float,
    **options: object,
) -> None:
    """The shards of the single-process result are what ``select`` gives for the shards."""
    expected = select(scores, masks, sparsity, **options)  # type: ignore[arg-type]
    chosen = select(
        distributed(scores, mesh, placements),
        MaskSet(distributed(masks, mesh, placements)),
        sparsity,
        **options,  # type: ignore[arg-type]
    )
    for name, part in distributed(expected, mesh, placements).items():
        mask = chosen[name]
        assert isinstance(mask, DTensor)
        assert mask.placements == tuple(placements)
        assert mask.shape == scores[name].shape
        assert mask.stride() == expected[name].stride()
        assert torch.equal(mask.to_local(), part.to_local()), (name, sparsity, options)


def every_scope(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scopes = ("global", "layer", "erk", PLAN)
    for seed, (scope, sparsity) in enumerate(itertools.product(scopes, (0.3, 0.61))):
        scores = tied_scores(seed)
        for dim0, masks_seed, min_keep in ((True, None, 0), (True, seed + 1, 3), (False, 5, 1)):
            placement = Shard(0) if dim0 else Replicate()
            check_equal(
                *(scores, masks_for(scores, masks_seed), mesh, [placement], sparsity),
                scope=scope,
                min_keep_per_layer=min_keep,
            )


def every_option(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = tied_scores(7, dtype)
        for masks, absolute in itertools.product(
            (masks_for(scores, None), masks_for(scores, 3)), (False, True)
        ):
            options = {"absolute": absolute, "monotone": not absolute}
            check_equal(scores, masks, mesh, [Shard(0)], 0.5, **options)
            check_equal(scores, masks, mesh, [Shard(0)], 0.4, min_keep_per_unit=2, **options)
            for scope in ("global", "layer"):
                check_equal(
                    scores, masks, mesh, [Shard(0)], 0.45, scope=scope, granularity="row", **options
                )
            runs = {"c": scores["c"], "e": scores["e"]}
            check_equal(
                *(runs, MaskSet({name: masks[name] for name in runs}), mesh, [Shard(0)], 0.5),
                granularity="n:m",
                n_m=(2, 4),
                **options,
            )


def signs_on_one_rank(rank: int) -> None:
    """Negative scores on one rank, elements that are off already on the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scores = {"w": torch.arange(1.0, 31.0).view(6, 5)}
    scores["w"][3:].neg_()
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:3, ::2] = False
    for sparsity in (0.3, 0.4, 0.7, 0.9):
        check_equal(scores, MaskSet({"w": mask}), mesh, [Shard(0)], sparsity)


def shards_along_the_inputs(rank: int) -> None:
    """Ties follow the flat index of the whole tensor, which alternates between the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for seed, sparsity in enumerate((0.1, 0.3, 0.35, 0.5, 0.62)):
        scores = {name: s for name, s in tied_scores(seed).items() if s.dim() > 1}
        for masks_seed in (None, 2):
            check_equal(scores, masks_for(scores, masks_seed), mesh, [Shard(1)], sparsity)
    conv = {"c": tied_scores(1)["c"]}
    check_equal(conv, masks_for(conv, None), mesh, [Shard(2)], 0.5)
    check_equal(
        *(conv, masks_for(conv, None), mesh, [Shard(2)], 0.5), granularity="n:m", n_m=(2, 4)
    )
    sharded = distributed(conv, mesh, [Shard(1)])
    masks = MaskSet(distributed(masks_for(conv, None), mesh, [Shard(1)]))
    for options, text in (
        ({"granularity": "n:m", "n_m": (2, 4)}, r"granularity 'n:m' needs .* got Shard\(1\) for c"),
        ({"granularity": "row"}, r"granularity 'row' needs whole rows .* got Shard\(1\) for c"),
        ({"min_keep_per_unit": 1}, r"min_keep_per_unit needs whole rows .* got Shard\(1\) for c"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            select(sharded, masks, 0.5, **options)  # type: ignore[arg-type]


def hybrid_shards(rank: int) -> None:
    """Groups of replicas, and whole tensors beside shards, which count once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for seed, scope in enumerate(("global", "layer", "erk", PLAN)):
        scores = tied_scores(seed)
        masks = masks_for(scores, 4)
        check_equal(scores, masks, mesh, [Replicate(), Shard(0)], 0.5, scope=scope)
        check_equal(scores, masks, mesh, [Shard(0), Replicate()], 0.5, scope=scope)
        expected = select(scores, masks, 0.5, scope=scope)
        mixed, present = dict(scores), dict(masks)
        for name, placements in (("a", [Replicate()]), ("c", [Shard(0)]), ("f", [Shard(0)])):
            for tensors in (mixed, present):
                tensors[name] = distribute_tensor(tensors[name], mesh["shards"], placements)
        chosen = select(mixed, MaskSet(present), 0.5, scope=scope)
        for name, mask in chosen.items():
            whole = mask.full_tensor() if isinstance(mask, DTensor) else mask
            assert torch.equal(whole, expected[name]), (name, scope)


@contextmanager
def recorded_sums() -> Iterator[list[int]]:
    """The lengths of all all-reduces; any other collective of ``torch.distributed`` fails."""
    lengths: list[int] = []
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "gather", "scatter"))]
    before = {name: getattr(dist, name) for name in names}

    def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> None:
        lengths.append(tensor.numel())
        before["all_reduce"](tensor, group=group)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("select must only add up")

    for name in names:
        setattr(dist, name, forbidden)
    dist.all_reduce = all_reduce  # type: ignore[assignment]
    try:
        yield lengths
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def of_fully_shard(rank: int) -> None:
    """Weights of an FSDP2 model are ranked where they lie; two sums of 65536 counts suffice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 33), nn.Linear(33, 21), nn.Linear(21, 1))
    whole = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}
    expected = select(whole, masks_for(whole, None), 0.7, absolute=True)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    masks = MaskSet({n: torch.ones_like(p, dtype=torch.bool) for n, p in weights.items()})
    with recorded_sums() as lengths:
        chosen = select(weights, masks, 0.7, absolute=True)
    assert [n for n in lengths if n == 65536] == [65536] * 2
    assert sum(n for n in lengths if n != 65536) < 50
    for name, mask in chosen.items():
        assert torch.equal(mask.full_tensor(), expected[name])  # type: ignore[attr-defined]


def same_errors(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    scores = tied_scores(0)
    masks = MaskSet(distributed(masks_for(scores, None), mesh, [Shard(0)]))
    sharded = distributed(scores, mesh, [Shard(0)])
    if rank == world - 1:
        sharded["c"].to_local()[-1, -1] = torch.nan
    with pytest.raises(ValueError, match="score c must hold numbers, got 9 NaN values"):
        select(sharded, masks, 0.5)
    sharded = distributed(scores, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.98"):
        select(sharded, masks, 0.99)
    with pytest.raises(ValueError, match=r"a must be placed as its mask, \(Shard\(dim=0\),\)"):
        select(scores, masks, 0.5)
    with pytest.raises(ValueError, match=r"as its mask, a plain tensor, got .*Shard"):
        select(sharded, masks_for(scores, None), 0.5)
    sums = {n: DTensor.from_local(s, mesh, [Partial()]) for n, s in scores.items()}
    kept = {n: DTensor.from_local(s == s, mesh, [Partial()]) for n, s in scores.items()}
    with pytest.raises(NotImplementedError, match=r"of fully_shard, got \(Partial\(sum\),\) for a"):
        select(sums, MaskSet(kept), 0.5)
    two = init_device_mesh("cpu", (1, world), mesh_dim_names=("x", "y"))
    elsewhere = {**sharded, "f": distribute_tensor(scores["f"], two["x"], [Shard(0)])}
    kept = {**masks, "f": distribute_tensor(scores["f"] == scores["f"], two["x"], [Shard(0)])}
    with pytest.raises(NotImplementedError, match="sharded over the same dimension of one device"):
        select(elsewhere, MaskSet(kept), 0.5)
    groups = [dist.new_group([0]), dist.new_group(list(range(world)))]
    with pytest.raises(ValueError, match=r"process_group must hold the ranks \[0, 1\] .*\[0\]"):
        select(sharded, masks, 0.5, process_group=groups[0])
    chosen = select(sharded, masks, 0.5, process_group=groups[1])
    assert chosen["c"].to_local().shape == sharded["c"].to_local().shape


@pytest.mark.parametrize(
    ("world", "body"),
    [
        (2, every_scope),
        (3, every_scope),
        (2, every_option),
        (2, signs_on_one_rank),
        (2, shards_along_the_inputs),
        (4, hybrid_shards),
        (2, of_fully_shard),
        (2, same_errors),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_shards(world: int, body: Callable[[int], None], tmp_path: Path) -> None:
    on_ranks(world, body, tmp_path)


def test_plain_tensors_need_no_group() -> None:
    """No rank communicates for tensors that it holds as a whole, whatever the group."""
    scores = tied_scores(0)
    masks = masks_for(scores, None)
    with recorded_sums() as lengths:
        select(scores, masks, 0.5)
    assert lengths == []
