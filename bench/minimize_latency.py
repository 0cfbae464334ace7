"""Latency of minimized networks against the full size that a mask leaves them at.

    python examples/squeeze_release.py --task mnist --data DIR --checkpoint RUN --out RUN.json
    python bench/minimize_latency.py --run RUN --arch lenet300 --image 1 28 28 --out LATENCY.json

RUN holds the networks of a cycle run. A masked network has the tensors of the dense one, so that
its time is that of the dense network, whatever its zeros; it is timed with the zeros of a mask at
the last cycle's number of weights all the same. Against it stand the network of every cycle, and
the masked network packed by ``sapwood.nn.to_sparse``, the other way to gain speed. All take turns
within one process, on one thread unless ``--threads`` says otherwise; the figure is the best of
many rounds, the speed-up the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sapwood import models
from sapwood._measure import interleave, machine_name
from sapwood.minimize import load
from sapwood.nn import to_sparse
from sapwood.pruning import prune

MASKED, PACKED = "masked", "masked, packed"


def networks(run: Path, arch: str, image: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Name -> network in evaluation mode, the masked one first."""

    def make() -> nn.Module:
        return models.build(arch, image, classes)

    state = json.loads((run / "squeeze_release.json").read_text(encoding="utf-8"))
    dense, *cycles = state["points"]
    masked = make()
    masked.load_state_dict(safetensors.torch.load_file(run / "dense.safetensors"))
    prune(masked, 1.0 - cycles[-1]["nonzeros"] / dense["nonzeros"])
    packed = copy.deepcopy(masked).eval()
    to_sparse(packed)
    found = {MASKED: masked.eval(), PACKED: packed}
    for cycle in cycles:
        name = f"cycle {cycle['number']}"
        found[name] = load(run / f"cycle-{cycle['number']}.safetensors", make).eval()
    return found


def measure(found: dict[str, nn.Module], x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """One row per network at one batch size."""
    calls = {name: (lambda model=model: model(x)) for name, model in found.items()}
    with torch.no_grad():
        times = interleave(calls, rounds=15, seconds=seconds)
    rows = []
    for name, samples in times.items():
        ratios = [full / own for full, own in zip(times[MASKED], samples, strict=True)]
        rows.append(
            {
                "network": name,
                "batch": len(x),
                "parameters": sum(p.numel() for p in found[name].parameters()),
                "best_us": 1e6 * min(samples),
                "median_us": 1e6 * statistics.median(samples),
                "speedup": statistics.median(ratios),
            }
        )
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a cycle run")
    parser.add_argument("--arch", choices=models.NAMES, required=True)
    parser.add_argument("--image", type=int, nargs=3, required=True, metavar=("C", "H", "W"))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--seconds", type=float, default=2.0, help="per batch size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    image = tuple(arguments.image)
    found = networks(arguments.run, arguments.arch, image, arguments.classes)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in arguments.batches:
        rows += measure(found, torch.randn(batch, *image, generator=generator), arguments.seconds)
    print(machine_name())
    print(f"{'network':<16}{'batch':>6}{'parameters':>12}{'best us':>10}{'speed-up':>10}")
    for row in rows:
        print(
            f"{row['network']:<16}{row['batch']:>6}{row['parameters']:>12,}"
            f"{row['best_us']:>10,.1f}{row['speedup']:>9.2f}x"
        )
    if arguments.out is not None:
        report = {"machine": machine_name(), "arch": arguments.arch, "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
