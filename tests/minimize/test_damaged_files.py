"""What the readers of plans, runs and minimized networks say to files that were altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sapwood.minimize import InputSelect, OutputScatter, Plan, analyze, load, save
from sapwood.minimize._cycle import Cycle, Store, Subject
from tests.fuzz.mutators import joined, split

SETUP = {"cycles": 1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))


def cuttable() -> nn.Sequential:
    """The last input is not read, and the first unit writes nothing."""
    model = network().eval()
    model[0].weight.data[:, -1].zero_()
    model[2].weight.data[:, 0].zero_()
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"groups": None}, "TypeError"),
        ({"groups": [1]}, "TypeError"),
        ({"refusals": [{"other": 1}]}, "TypeError"),
        ({"more": 1}, "TypeError"),
    ],
    ids=["no list", "no group", "no refusal", "more"],
)
def test_damaged_plans(change: dict[str, Any], reason: str) -> None:
    content = json.loads(analyze(cuttable(), torch.randn(1, 5)).to_json()) | change
    with pytest.raises(ValueError, match=rf"text must be an undamaged plan, got {reason}"):
        Plan.from_json(json.dumps(content))


def test_plans_that_are_no_json() -> None:
    with pytest.raises(ValueError, match=r"Plan.from_json: text must be JSON, got Expecting"):
        Plan.from_json("")
    with pytest.raises(ValueError, match=r"text must be JSON, got .*recursion"):
        Plan.from_json("[" * 100_000)


def run_folder(folder: Path) -> Path:
    """What a run of no cycle keeps."""
    model = network()
    subject = Subject(model, Cycle(0, 26, 104, 21, 21, 0.0, 0.5), 21, None)
    Store(folder, SETUP, True).save(subject, model, None)
    return folder / "squeeze_release.json"


@pytest.mark.parametrize(
    "change",
    [
        {"points": [{}]},
        {"points": []},
        {"points": None},
        {"prunable": "21"},
        {"names": [1]},
        {"points": [{"number": "../0", "refusals": []}]},
    ],
    ids=["cycle", "none", "no list", "prunable", "names", "number"],
)
def test_damaged_runs(change: dict[str, Any], tmp_path: Path) -> None:
    state = run_folder(tmp_path)
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint must hold an undamaged run, got "):
        Store(tmp_path, SETUP, True).load(model, network)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_runs_without_weights(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "dense.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"SqueezeRelease: checkpoint must hold an undamaged"):
        Store(tmp_path, SETUP, True).load(network(), network)


def test_a_manifest_cannot_ask_for_memory(tmp_path: Path) -> None:
    """The length of an index is that of the index in the file, that of a bias its own."""

    def narrow() -> nn.Sequential:
        layer = nn.Linear(2, 2, bias=False)
        return nn.Sequential(
            nn.Sequential(
                InputSelect(torch.tensor([0, 2])), layer, OutputScatter(torch.tensor([1, 4]), 5)
            )
        )

    path = tmp_path / "small.safetensors"
    save(narrow(), path)
    assert load(path, narrow)[0][0].index.tolist() == [0, 2]
    header, data = split(path.read_bytes())
    undamaged = header["__metadata__"]["modules"]
    for module, key, message in (
        ("0.0", "index", r"0\.0\.index has another length"),
        ("0.2", "width", r"0\.2\.bias has another length"),
        ("0", "members", "0 has 1099511627776 members"),
    ):
        modules = json.loads(undamaged)
        modules[module][key] = 2**40
        header["__metadata__"]["modules"] = json.dumps(modules)
        path.write_bytes(joined(header, data))
        with pytest.raises(ValueError, match=message):
            load(path, narrow)
