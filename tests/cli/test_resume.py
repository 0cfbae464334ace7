"""``sapwood prune`` after Ctrl-C: what is kept, how it goes on, and that the bits are the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from sapwood.cli import console
from tests.cli.conftest import Invoke

EPOCH = 23  # steps: 1437 images in batches of 64


@pytest.fixture(autouse=True)
def _small_digits(small_digits: None) -> None:
    """Every run here takes moments."""


def ctrl_c_at(step: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Sends SIGINT to this process when a step is shown, counted over all stages."""
    shown = console.Bars.step

    def interrupted(
        self: console.Bars, done: int, total: int, note: str, name: str | None = None
    ) -> None:
        shown(self, done, total, note, name)
        if done == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console.Bars, "step", interrupted)


def results(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("progressive", 1),
        ("progressive", EPOCH),
        ("cubic", 29),
        ("dense", 31),
        ("snip", 5),
        ("random", 40),
        ("rigl", 30),
        ("one-shot", 7),
        ("finetune", 2 * EPOCH + 3),  # in the fine-tuning
        ("lth", 2 * 2 * EPOCH + 9),  # in the second round
    ],
)
def test_resumed_run_ends_in_the_same_bits(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    options = ["prune", "--method", method, "--sparsity", "0.6", "--json"]
    whole = invoke(*options, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        ctrl_c_at(step, patch)
        stopped = invoke(*options, "--out", tmp_path / "parts")
    assert stopped.exit_code == 130, stopped.output
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["checkpoint"]
    resumed = invoke(*options, "--out", tmp_path / "parts", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoint").exists()
    one, other = json.loads(whole.stdout), json.loads(resumed.stdout)
    for key in ("accuracy", "steps", "history", "masks_digest", "sparsity_report", "setup"):
        assert one[key] == other[key]


def test_the_printed_command_resumes(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a folder; with $signs"
    with monkeypatch.context() as patch:
        ctrl_c_at(10, patch)
        stopped = invoke("prune", "--out", out, "--method", "cubic", "--seed", "3")
    assert stopped.exit_code == 130
    assert "finishing this step; Ctrl-C again stops at once" in stopped.stderr
    command = stopped.stderr.splitlines()[-1]
    assert (
        command == f"sapwood prune --method cubic --seed 3 --out {shlex.quote(str(out))} --resume"
    )
    resumed = invoke(*shlex.split(command)[1:])
    assert resumed.exit_code == 0, resumed.output
    assert (out / "model.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ctrl_c_at(10, patch, times=2)
        stopped = invoke("prune", "--out", tmp_path / "out")
    assert stopped.exit_code == 130
    assert "finishing this step" not in stopped.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_run_is_not_overwritten(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ctrl_c_at(10, patch)
        invoke("prune", "--out", tmp_path)
    again = invoke("prune", "--out", tmp_path)
    assert again.exit_code == 2
    assert "holds an interrupted run: --resume goes on with it" in again.stderr
    shutil.rmtree(tmp_path / "checkpoint")
    assert invoke("prune", "--out", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "0.8"], "with --sparsity 0.9, got 0.8"),
        (["--method", "cubic"], "with --method progressive, got cubic"),
        (["--seed", "1"], "with --seed 0, got 1"),
        (["--arch", "lenet300"], "with --arch mlp, got lenet300"),
        (["--threads", "2"], "with --threads 1, got 2"),
        (["--limit", "500"], "with --limit None, got 500"),
    ],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_another_run_is_not_resumed(
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    finished: bool,
) -> None:
    with monkeypatch.context() as patch:
        if not finished:
            ctrl_c_at(10, patch)
        invoke("prune", "--epochs", "1", "--out", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = invoke("prune", "--epochs", "1", "--out", tmp_path, *options, "--resume")
    assert result.exit_code == 2
    state = "a finished" if finished else "an interrupted"
    assert f"holds {state} run {message}" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_run_says_so(invoke: Invoke, tmp_path: Path) -> None:
    first = invoke("prune", "--epochs", "1", "--out", tmp_path, "--json")
    again = invoke("prune", "--epochs", "1", "--out", tmp_path, "--resume")
    assert again.exit_code == 0
    accuracy = json.loads(first.stdout)["accuracy"]
    assert again.stdout.startswith("nothing to resume: the run in ")
    assert again.stdout.rstrip().endswith(f"is finished, accuracy {accuracy:.2%}")
    as_json = invoke("prune", "--epochs", "1", "--out", tmp_path, "--resume", "--json")
    assert json.loads(as_json.stdout) == json.loads(first.stdout)


def test_resume_without_a_run_begins(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("prune", "--epochs", "1", "--out", tmp_path / "new", "--resume")
    assert result.exit_code == 0, result.output
    assert "nothing to resume in" in result.stderr
    assert (tmp_path / "new" / "report.json").exists()


def test_a_damaged_checkpoint_is_one_line(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ctrl_c_at(10, patch)
        invoke("prune", "--out", tmp_path)
    file = tmp_path / "checkpoint" / "running.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = invoke("prune", "--out", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "running.safetensors" in result.stderr
    assert "Traceback" not in result.output
