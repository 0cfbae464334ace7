"""The plan of a minimization: what stays, why, and the steps that cut the rest."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize._masks import materialised
from sapwood.minimize.layers import Edit
from sapwood.minimize.surgery import operate

__all__ = ["ChannelGroup", "Plan", "Refusal", "fingerprint"]

_FORMAT = "sapwood.minimize.plan/1"


@dataclass(frozen=True)
class Refusal:
    """What stays because removing it would not be exact.

    ``channels`` counts the channels of a group; 0 means a layer or attention that is left alone as
    a whole.
    """

    group: str
    channels: int
    reason: str

    def __str__(self) -> str:
        what = f"{self.channels} channels stay" if self.channels else "left alone"
        return f"{self.group}: {what}: {self.reason}"


@dataclass(frozen=True)
class ChannelGroup:
    """The channels that one layer writes.

    ``constants`` maps removed channels that held a constant other than zero to it, as the last
    reader saw it; ``reason`` tells why channels stay that nothing else demands.
    """

    name: str
    width: int
    kept: list[int]
    constants: dict[int, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a minimization keeps and cuts; printing it gives a table.

    Example:
        >>> import torch
        >>> from sapwood.minimize import Plan, analyze
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).eval()
        >>> _ = model[2].weight.data[:, 1].zero_()         # nobody reads the second hidden unit
        >>> plan = analyze(model, torch.randn(2, 4))
        >>> plan.groups[0].kept
        [0, 2]
        >>> Plan.from_json(plan.to_json()).apply(model)[0].out_features
        2

    Args:
        groups: the channel groups in the order of the network.
        edits: the steps of surgery.
        refusals: what stays for another reason than being read.
        fingerprint: digest of the masked weights that the plan was made for.
        promises: what the caller promised about the inputs.
    """

    groups: list[ChannelGroup]
    edits: list[Edit]
    refusals: list[Refusal]
    fingerprint: str
    promises: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Cuts a copy of the model that the plan was made for.

        Args:
            model: the masked model; it is not changed.
            masks: as given to ``analyze``.

        Returns:
            The minimized copy.

        Raises:
            ValueError: if the model's masked weights are not those of the plan.
        """
        plain = materialised(model, masks)
        if fingerprint(plain) != self.fingerprint:
            expected = f"have the masked weights of the plan {self.fingerprint[:12]}"
            _check.fail(
                ValueError, "minimize.Plan.apply", "model", expected, fingerprint(plain)[:12]
            )
        return operate(plain, self.edits)

    def to_json(self) -> str:
        """The plan as JSON, numbers in full precision."""
        return json.dumps({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: if the text is no plan of this version, or a damaged one.
        """
        where = "minimize.Plan.from_json"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            _check.fail(ValueError, where, "text", "be JSON", error)
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != _FORMAT:
            _check.fail(ValueError, where, "text", f"be a {_FORMAT}", found)
        try:
            groups = [
                ChannelGroup(**{**g, "constants": {int(k): v for k, v in g["constants"].items()}})
                for g in content.pop("groups")
            ]
            refusals = [Refusal(**r) for r in content.pop("refusals")]
            return cls(groups=groups, refusals=refusals, **content)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            _check.fail(ValueError, where, "text", "be an undamaged plan", repr(error))

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False, header_style="")
        table.add_column("layer", overflow="fold")
        for title in ("width", "kept", "constant"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("stays because", overflow="fold")
        for group in self.groups:
            numbers = (group.width, len(group.kept), len(group.constants))
            table.add_row(group.name, *(str(n) for n in numbers), group.reason or "")
        console = Console(file=io.StringIO(), width=80, no_color=True)
        console.print(table)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        lines = [line.rstrip() for line in text.splitlines()]
        return "\n".join([*lines, *self._merged()])

    def _merged(self) -> list[str]:
        """What was merged, a line for each layer."""
        units: Counter[str] = Counter()
        lines: list[str] = []
        for edit in self.edits:
            if edit["op"] == "merge":
                units[edit["module"]] += len(edit["units"])
            elif edit["op"] == "multiply":
                lines.append(f"{edit['module']} holds its product with {edit['first']}")
            elif edit["op"] == "thin":
                count = len(edit["rows"])
                lines.append(f"{edit['module']} computes {_counted(count, 'unit')} for nobody")
        merged = [
            f"{layer}: {_counted(count, 'unit')} merged into multiples"
            for layer, count in units.items()
        ]
        return [*merged, *lines]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()
