"""``sapwood mnist-add``: learn digits from sums, and say how well and at what cost."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapwood.cli import console

if TYPE_CHECKING:
    from sapwood.cli.additions import Request


class Net(str, Enum):
    """The networks that read digits."""

    auto = "auto"
    small = "small"
    ltn = "ltn"
    dpl = "dpl"


class Pairing(str, Enum):
    """How images become pairs."""

    random = "random"
    sequential = "sequential"


def mnist_add(
    data: Annotated[
        str, typer.Option(help="digits, or the folder of MNIST's four idx files.")
    ] = "digits",
    digits: Annotated[int, typer.Option(help="Digits of each number.")] = 1,
    train: Annotated[int | None, typer.Option(help="Training pairs; default 3000 / 1500.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the pairs; default 10, MNIST 20.", min=1)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, by commas; default 0, MNIST 0,1,2,3,4.")
    ] = None,
    net: Annotated[Net, typer.Option(help="auto is small for the digits, ltn for MNIST.")] = (
        Net.auto
    ),
    batch_size: Annotated[int, typer.Option(help="Pairs per step.", min=1)] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    pairing: Annotated[Pairing, typer.Option(help="Of MNIST's images.")] = Pairing.random,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check", help="First compare with enumeration; default for 1 digit."
        ),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Time the lazy sum against the joint; no training.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Weights of the last seed, safetensors.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="A page of the results, HTML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Learn to read digits from the sums of numbers alone, by exact marginalisation."""
    bundled = data == "digits"
    if bundled:
        console.require("mnist-add", {"sklearn": "scikit-learn"})
    if digits < 1:
        raise typer.BadParameter(f"--digits must be at least 1, got {digits}")
    if not lr > 0:
        raise typer.BadParameter(f"--lr must be positive, got {lr}")
    if check and digits > 2:
        raise typer.BadParameter(f"--check enumerates at most 2 digits, got --digits {digits}")
    console.require_ops()
    import torch

    from sapwood.cli import additions

    torch.set_num_threads(threads)
    request = additions.Request(
        data=data,
        digits=digits,
        train=train if train is not None else 3000 if digits == 1 else 1500,
        epochs=epochs or (10 if bundled else 20),
        seeds=_seeds(seeds or ("0" if bundled else "0,1,2,3,4")),
        net=("small" if bundled else "ltn") if net is Net.auto else net.value,
        batch_size=batch_size,
        lr=lr,
        pairing=pairing.value,
        check=digits == 1 if check is None else check,
    )
    with console.reported(save or report or Path(data)):
        if ablate:
            _ablate(request, as_json)
            return
        result = _train(request)
        if save is not None:
            additions.save(save, result)
        if report is not None:
            additions.write_page(report, result)
    if as_json:
        console.print_json(additions.as_data(result))
    else:
        additions.show(result)
    if result.check is not None and not result.check.agrees:
        raise typer.Exit(1)


def _train(request: Request) -> Any:
    from sapwood.cli import additions
    from sapwood.cli.interrupt import Interrupts

    try:
        with console.bars() as bars, Interrupts(bars.say) as interrupts:
            return additions.run(request, bars, interrupts.check)
    except KeyboardInterrupt:
        console.fail("interrupted; nothing was written", console.INTERRUPTED)


def _ablate(request: Request, as_json: bool) -> None:
    from sapwood.cli import additions

    rows = additions.ablate(request)
    if as_json:
        console.print_json({"schema": "sapwood.mnist-add.ablation/1", "rows": rows})
    else:
        additions.show_ablation(request, rows)


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0 or len(set(found)) < len(found):
        raise typer.BadParameter(f"--seeds must be distinct numbers by commas, got {text!r}")
    return found
