"""A comparison in several processes: the same results, and a clean end whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sapwood.cli import comparison, pool, tasks
from sapwood.cli.choices import Variant
from sapwood.cli.comparison import Request
from sapwood.cli.interrupt import Interrupts
from sapwood.cli.runs import Job
from sapwood.data import Dataset

VARIANTS = tuple(map(Variant.parse, ["finetune", "random:snip", "snip", "lth"]))


def request(**changes: object) -> Request:
    asked = Request("digits", None, VARIANTS, (0.5, 0.8), (0, 1), epochs=1, limit=640)
    return replace(asked, **changes)  # type: ignore[arg-type]


def digits() -> Dataset:
    return tasks.read("digits", None, 640)


def execute(
    asked: Request, out: Path, workers: int, listener: pool.Listener | None = None
) -> dict[str, list[object]]:
    dataset = digits()
    folder = comparison.open_folder(out, asked, dataset, resume=True)
    todo = comparison.missing(asked.jobs(), folder)
    listener = listener or pool.Listener(lambda steps: None, lambda job: None)
    comparison.execute(todo, asked, dataset, folder, workers, listener)
    records = comparison.collect(asked, dataset.source, folder).records
    kept = ("accuracy", "masks_digest", "steps", "left_zero_after_last_update")
    return {record["name"]: [record.get(key) for key in kept] for record in records}


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path, threads: None) -> None:
    steps, done = [0], []

    def count(further: int) -> None:
        steps[0] += further

    listener = pool.Listener(count, lambda job: done.append(job.title))
    together = execute(request(), tmp_path / "two", 2, listener)
    assert together == execute(request(), tmp_path / "one", 1)
    assert sorted(done) == sorted(job.title for job in request().jobs())
    assert steps[0] == 10 * sum(job.epochs for job in request().jobs())  # 640 images by 64
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_comparison(tmp_path: Path) -> None:
    def kill(job: Job) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    listener = pool.Listener(lambda steps: None, kill)
    with pytest.raises(pool.JobError, match=r"a worker died.* with exit code -9: out of memory"):
        execute(request(), tmp_path, 2, listener)
    assert multiprocessing.active_children() == []
    assert len(execute(request(), tmp_path, 1)) == len(request().jobs()) + 2  # lth has two


@pytest.mark.slow
def test_an_error_in_a_worker_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = replace(tasks.PLANS["digits"], lr=1e30)
    monkeypatch.setitem(tasks.PLANS, "digits", wild)
    with pytest.raises(pool.JobError, match=r"seed \d: ValueError: .*NaN"):
        execute(request(), tmp_path, 2)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_comparison_goes_on(tmp_path: Path, workers: int) -> None:
    asked, seen = request(sparsities=(0.8,), epochs=4), [0]

    def interrupt(further: int) -> None:
        seen[0] += further
        if seen[0] > 60 and not seen[1:]:
            seen.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    listener = pool.Listener(interrupt, lambda job: None)
    with pytest.raises(KeyboardInterrupt):
        execute(asked, tmp_path / "parts", workers, listener)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    left = comparison.missing(asked.jobs(), tmp_path / "parts" / "runs")
    assert left
    assert any((tmp_path / "parts" / "runs").glob(".*/running.safetensors"))
    parts = execute(asked, tmp_path / "parts", workers)
    whole = execute(asked, tmp_path / "whole", 1)
    for name, (*outcome, left_zero) in whole.items():
        *resumed, watched = parts.pop(name)
        assert resumed == outcome
        # a round that was finished before the interruption is read, and nobody watched it
        assert watched in (left_zero, None)
    assert parts == {}
    assert not list((tmp_path / "parts" / "runs").glob(".*"))


def running(group: int) -> list[str]:
    """The processes of a group, without those that only wait to be buried."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, owner = file.read_text().rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_processes(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole group, workers included."""
    command = [sys.executable, "-m", "sapwood", "compare", "--jobs", "2", "--epochs", "400"]
    process = subprocess.Popen(
        [*command, "--methods", "snip", "--sparsity", "0.8", "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        folder = tmp_path / "runs"
        while not list(folder.glob(".*/running.safetensors")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("sapwood compare --methods snip")
    assert last.endswith(f"--out {tmp_path} --resume")
    deadline = time.monotonic() + 30
    while running(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    setup = json.loads((folder / "setup.json").read_text())
    assert setup["epochs"] == 400


def test_interrupts_are_noted_once_and_then_raised() -> None:
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
