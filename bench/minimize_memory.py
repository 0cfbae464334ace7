"""Peak memory and time of ``sapwood.minimize`` on a ConvNeXt-Tiny.

``python bench/minimize_memory.py [--runs 3] [--threads 1] [--json FILE]``: a ConvNeXt-Tiny of
28.6 million parameters for images of 64 x 64, with zeros at random among the weights of its linear
layers and convolutions and with dead hidden units in every block, minimized with verification.
Each run has a child process of its own, which builds the masked network first; memory is the
growth of the resident set from there to its peak, over the size of the parameters. A first call
also loads torch.export, whatever the network: the figure that counts, "first call", has that in
it, and "later call" has not, since a small network was minimized before. The worst run counts.
The exit status is 1 when a floor is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peak_memory import _kib
from points import Point, report
from torch import Tensor, nn

from sapwood.minimize import minimize
from sapwood.models import ConvNeXt

#: What we aim at.
SECONDS, RATIO = 60.0, 3.0
CALLS = ("first call", "later call")


@dataclass(frozen=True)
class Setup:
    """A ConvNeXt with a share of zeros everywhere and a share of dead hidden units."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    classes: int
    sparsity: float
    dead: float

    def build(self) -> nn.Module:
        """The masked network in evaluation mode."""
        torch.manual_seed(0)
        model = ConvNeXt((3, 64, 64), self.classes, widths=self.widths, depths=self.depths).eval()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    weight = module.weight
                    weight[torch.rand_like(weight) < self.sparsity] = 0.0
                    if name.endswith("expand"):
                        weight[torch.rand(len(weight)) < self.dead] = 0.0
        return model


def measure(call: str, setup: Setup) -> dict[str, Any]:
    """One minimization in this process."""
    if call == "later call":
        minimize(replace(setup, widths=(4, 6), depths=(1, 1), classes=10).build(), images())
    model, x = setup.build(), images()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before, start = _kib(status, "VmRSS"), time.perf_counter()
    _, found = minimize(model, x)
    seconds = time.perf_counter() - start
    peak = (_kib(status, "VmHWM") - before) * 1024
    return {
        "call": call,
        "seconds": seconds,
        "peak_bytes": peak,
        "ratio": peak / size,
        "parameters": [found.parameters_before, found.parameters_after],
        "max_error": found.max_error,
    }


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def in_child(call: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [f"--{key}={getattr(options, key)}" for key in ("threads", "sparsity", "dead")]
    command = (sys.executable, __file__, *words, "--child", call)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = json.loads(output)
    return row


def points(options: argparse.Namespace) -> Iterator[Point]:
    """Memory and time of both kinds of calls."""
    for call in CALLS:
        rows = [in_child(call, options) for _ in range(options.runs)]
        worst = max(rows, key=lambda row: row["ratio"])
        before, after = worst["parameters"]
        size = f"{worst['peak_bytes'] / 1e6:.0f} MB; {before:,} -> {after:,} parameters"
        runs = ", ".join(f"{row['ratio']:.2f}" for row in rows)
        yield Point(
            f"{call}: peak / parameters",
            RATIO,
            worst["ratio"],
            at_least=False,
            note=f"{size}; runs {runs}",
        )
        seconds = max(row["seconds"] for row in rows)
        yield Point(f"{call}: time", SECONDS, seconds, at_least=False, unit="s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--dead", type=float, default=0.5, help="share of hidden units")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", choices=CALLS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        setup = Setup((96, 192, 384, 768), (3, 3, 9, 3), 1000, options.sparsity, options.dead)
        print(json.dumps(measure(options.child, setup)))
        return 0
    return 1 if report(points(options), options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
