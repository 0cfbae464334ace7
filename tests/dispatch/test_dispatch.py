"""The dispatch tables: prediction, choice, files, environment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood.ops import _calibrate, _cost_model, _dispatch
from sapwood.ops._cost_model import DispatchTable, Key, Surface
from tests.dispatch.tables import KEY, surface, table


@pytest.mark.parametrize(
    "batch", [0, 1, 2, 3, 4, 8, 9, 15, 16, 17, 31, 33, 64, 511, 512, 513, 9999]
)
def test_batch_bucket_is_the_last_that_begins_at_or_below(batch: int) -> None:
    begun = [i for i, first in enumerate(_dispatch.BUCKETS) if first <= max(batch, 1)]
    assert _dispatch.batch_bucket(batch) == begun[-1]


def test_the_first_batch_of_a_bucket_wastes_most_of_its_panels() -> None:
    """What beats dense there, whose cost is proportional, beats it in the whole bucket."""

    def waste(batch: int) -> float:
        return _cost_model.batch_units("csr", batch) / batch

    for first, after in zip(_dispatch.BUCKETS, _dispatch.BUCKETS[1:], strict=False):
        if first >= 9:
            worst = max(waste(batch) for batch in range(first, after))
            assert worst == pytest.approx(waste(first), rel=0.1)


def test_prediction_is_the_stated_formula() -> None:
    n, k, batch, density = 512, 1024, 16, 0.25
    nnz = int(n * k * density)
    expected = {
        "dense": 1e-6 + 1e-12 * n * k * batch,
        "csr": 1e-6 + 2e-12 * density * n * k * batch * (k / n) ** _cost_model.SKEW,
    }
    for name, seconds in expected.items():
        assert _dispatch.predict(table(), name, n, k, nnz, batch) == pytest.approx(seconds)


def test_csr_pays_for_whole_panels() -> None:
    def at(batch: int) -> float:
        return _dispatch.predict(table(), "csr", 1024, 1024, 100_000, batch)

    assert at(1) == at(16) < at(17) == at(32) < at(33) == at(64) < at(65) == at(80)


def test_prediction_at_a_knot_is_the_measurement_and_between_knots_lies_between() -> None:
    costs = tuple(tuple((c * b,) for b in (1.0, 2.0)) for c in (1e-12, 3e-12))
    dense = Surface(0.0, (1, 64), (1.0,), costs)
    t = table(surfaces={"dense": dense})

    def cost(side: int, batch: int) -> float:
        seconds = _dispatch.predict(t, "dense", side, side, side * side, batch)
        return seconds / (side * side * batch)

    assert cost(256, 1) == pytest.approx(1e-12)
    assert cost(1024, 64) == pytest.approx(6e-12)
    assert cost(512, 8) == pytest.approx(3e-12)  # the middle of 1, 2, 3, 6 in logarithms
    assert cost(64, 1) == pytest.approx(1e-12)
    assert cost(4096, 4096) == pytest.approx(6e-12)


def test_prediction_never_falls_below_the_overhead() -> None:
    steep = surface(-1.0, slope=1.0)
    t = table(surfaces={"dense": surface(1e-12), "csr": steep})
    assert _dispatch.predict(t, "csr", 1024, 1024, 0, 1) == steep.overhead


@pytest.mark.parametrize(("n", "k", "batch"), [(0, 8, 4), (8, 0, 4), (8, 8, 0)])
def test_empty_problems_cost_the_overhead(n: int, k: int, batch: int) -> None:
    assert _dispatch.predict(table(), "dense", n, k, 0, batch) == 1e-6
    assert _dispatch.choose(table(), n, k, 0, batch)[0] == "dense"


def test_formats_without_kernel_are_not_predicted() -> None:
    assert math.isinf(_dispatch.predict(table(), "bitmap", 64, 64, 100, 9))
    assert math.isinf(_dispatch.predict(table(), "sell", 64, 64, 100, 1))
    assert set(_dispatch.choose(table(), 64, 64, 100, 9)[1]) == {"dense", "csr"}


def test_sparse_wins_only_with_a_margin() -> None:
    n = k = 1024
    at = {
        "just": _cost_model.MARGIN * 0.5 - 0.005,
        "not": _cost_model.MARGIN * 0.5 + 0.005,
    }  # csr costs 2 * density of dense
    chosen = {
        name: _dispatch.choose(table(), n, k, int(density * n * k), 512, ("dense", "csr"))[0]
        for name, density in at.items()
    }
    assert chosen == {"just": "csr", "not": "dense"}


def test_choice_takes_the_fastest_and_reports_all() -> None:
    best, times = _dispatch.choose(table(), 1024, 1024, 1024 * 512, 1)
    assert best == "bitmap"
    assert set(times) == {"dense", "csr", "bitmap"}
    assert times[best] == min(times.values())


def test_choice_among_sparse_formats_needs_no_margin() -> None:
    assert _dispatch.choose(table(), 1024, 1024, 1024 * 1024, 64, ("csr",))[0] == "csr"


def test_useful_formats_are_the_winners_of_some_batch() -> None:
    nnz = 1024 * 512
    assert _dispatch.useful_formats(table(), 1024, 1024, nnz) == ("dense", "bitmap")
    assert _dispatch.useful_formats(table(), 1024, 1024, nnz, batches=(64,)) == ("dense",)


def test_only_overrides_the_costs_where_the_format_has_a_kernel() -> None:
    forced = table(only="bitmap")
    assert _dispatch.choose(forced, 1024, 1024, 1024 * 1024, 8)[0] == "bitmap"
    assert _dispatch.choose(forced, 1024, 1024, 1024 * 1024, 9)[0] == "dense"
    assert _dispatch.choose(forced, 1024, 1024, 1024 * 1024, 8, ("dense", "csr"))[0] == "dense"


@pytest.mark.parametrize(
    ("formats", "text"), [((), "got none"), (("bitmap", "sell"), "batch 9, got bitmap, sell")]
)
def test_choice_without_candidates_is_an_error(formats: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=rf"sapwood\.choose: formats must have a kernel.*{text}"):
        _dispatch.choose(table(), 8, 8, 8, 9, formats)


def test_json_round_trip_is_exact() -> None:
    assert DispatchTable.from_json(table().to_json()) == table()


def broken(**changes: Any) -> str:
    return json.dumps({**json.loads(table().to_json()), **changes})


def broken_surface(**changes: Any) -> str:
    content = json.loads(table().to_json())
    content["surfaces"]["csr"].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        pytest.param("{", "text", id="truncated"),
        pytest.param("[" * 100_000, "text", id="deep"),
        pytest.param("[]", "text", id="list"),
        pytest.param(broken(layout=0), "layout", id="layout"),
        pytest.param(broken(key={"device": "cpu"}), "key", id="key-incomplete"),
        pytest.param(broken(key={**vars(KEY), "threads": "1"}), "key", id="threads-text"),
        pytest.param(broken(key={**vars(KEY), "device": "tpu"}), "device", id="device"),
        pytest.param(broken(sides=[]), "sides", id="sides-empty"),
        pytest.param(broken(sides=[1024, 256]), "sides", id="sides-descending"),
        pytest.param(broken(sides=[True, 256]), "sides", id="sides-bool"),
        pytest.param(broken(sides=[10**400]), "sides", id="sides-huge"),
        pytest.param(broken(surfaces=[]), "surfaces", id="surfaces-list"),
        pytest.param(broken(surfaces={"coo": {}}), "surfaces", id="format-unknown"),
        pytest.param(broken(surfaces={}), "surfaces", id="no-dense"),
        pytest.param(broken(surfaces={"dense": {}}), "surface dense", id="surface-empty"),
        pytest.param(broken_surface(overhead=-1), "overhead", id="overhead-negative"),
        pytest.param(broken_surface(overhead=math.nan), "overhead", id="overhead-nan"),
        pytest.param(broken_surface(overhead="1"), "overhead", id="overhead-text"),
        pytest.param(broken_surface(batches=[0]), "batches", id="batch-zero"),
        pytest.param(broken_surface(densities=[0.5, 0.5]), "densities", id="density-twice"),
        pytest.param(broken_surface(costs=[[[1]]]), "costs", id="costs-shape"),
        pytest.param(
            broken_surface(costs=[[[0, 1], [0]], [[0, 1], [0, 1]]]), "costs", id="costs-ragged"
        ),
        pytest.param(
            broken_surface(costs=[[[0, math.inf], [0, 0]], [[0, 1], [0, 1]]]),
            "costs",
            id="infinite",
        ),
    ],
)
def test_every_field_of_a_table_is_checked(text: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^sapwood\.DispatchTable: {field}.* must .*, got "):
        DispatchTable.from_json(text)


def test_first_use_measures_once_and_writes_the_cache(
    measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _dispatch.table_for("cpu", torch.float32)
    assert first.source == "calibrated"
    assert _dispatch.table_for("cpu", torch.float32) is first
    monkeypatch.setattr(_dispatch, "_memory", {})  # as in the next process
    again = _dispatch.table_for("cpu", torch.float32)
    assert again.source == str(_dispatch.cache_file())
    assert again.surfaces == first.surfaces
    assert len(measured) == 1
    assert list(_dispatch.cache_file().parent.iterdir()) == [_dispatch.cache_file()]


def test_tables_of_other_keys_stay_in_the_file(measured: list[Key]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _dispatch.calibrate(dtype=dtype)
    content = json.loads(_dispatch.cache_file().read_text())
    assert [t["key"]["dtype"] for t in content["tables"]] == ["float32", "bfloat16"]


def test_calibrate_measures_anew_only_when_forced(measured: list[Key]) -> None:
    _dispatch.calibrate()
    _dispatch.calibrate()
    assert len(measured) == 1
    _dispatch.calibrate(force=True)
    assert len(measured) == 2


def test_threads_are_part_of_the_key(measured: list[Key]) -> None:
    other = torch.get_num_threads() + 1
    assert _dispatch.calibrate(threads=other).key.threads == other
    assert _dispatch.calibrate().key.threads == other - 1
    assert len(measured) == 2


def test_without_leave_to_measure_the_nearest_table_is_taken(measured: list[Key]) -> None:
    unmeasured = _dispatch.table_for("cpu", torch.float32, may_calibrate=False)
    assert unmeasured.source.startswith("builtin")
    near, far = torch.get_num_threads() + 1, torch.get_num_threads() + 9
    for threads in (far, near):
        _dispatch.calibrate(threads=threads)
    taken = _dispatch.table_for("cpu", torch.float32, may_calibrate=False)
    assert taken.key.threads == near
    assert len(measured) == 2


def test_nothing_is_measured_on_fake_tensors(measured: list[Key]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert _dispatch.table_for("cpu", torch.float32).source.startswith("builtin")
    assert measured == []


def test_builtin_policy_and_deterministic_mode_do_not_measure(
    measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert _dispatch.table_for("cpu", torch.float32).source.startswith("builtin")
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("SAPWOOD_DISPATCH", "builtin")
    assert _dispatch.table_for("cpu", torch.float32).source.startswith("builtin")
    assert measured == []


@pytest.mark.parametrize("name", _cost_model.FORMATS)
def test_environment_prescribes_a_format(
    name: str, measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPWOOD_DISPATCH", name)
    assert _dispatch.table_for("cpu", torch.float32).only == name
    assert measured == []


def test_unknown_policy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_DISPATCH", "fastest")
    text = (
        "sapwood: SAPWOOD_DISPATCH must be one of auto, builtin, dense, bitmap, csr, sell, "
        "got 'fastest'"
    )
    with pytest.raises(ValueError, match=f"^{text}$"):
        _dispatch.table_for("cpu", torch.float32)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"seconds": 0}, ValueError, "seconds must be positive and finite, got 0"),
        ({"seconds": math.nan}, ValueError, "seconds must be positive and finite, got nan"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        (
            {"dtype": torch.int8},
            TypeError,
            "dtype must be one of float64, float32, bfloat16, float16, got torch.int8",
        ),
    ],
    ids=["seconds", "nan", "threads", "dtype"],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=rf"^sapwood\.calibrate: {text}$"):
        _dispatch.calibrate(**arguments)


def test_cache_file_names_cpu_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sapwood

    name = _dispatch.cache_file().name
    assert name.startswith("dispatch-")
    assert name.endswith(f"-{sapwood.__version__}.json")
    monkeypatch.delenv("SAPWOOD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert _dispatch.cache_file() == tmp_path / "sapwood" / name


@pytest.mark.parametrize("bound", ["default", "avx2", "avx512"])
def test_isa_is_bounded_by_the_environment(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ("default", "avx2", "avx512")
    monkeypatch.delenv("SAPWOOD_CPU_CAPABILITY", raising=False)
    best = order.index(_dispatch.cpu_isa())
    monkeypatch.setenv("SAPWOOD_CPU_CAPABILITY", bound)
    assert order.index(_dispatch.cpu_isa()) == min(best, order.index(bound))


def test_gpu_without_measurement_stays_dense() -> None:
    unknown = _dispatch.builtin_table(Key("cuda", "sm_90", "float16", 1))
    assert _dispatch.choose(unknown, 4096, 4096, 1000, 1)[0] == "dense"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "default"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_builtin_tables_know_every_format_and_decide_sensibly(isa: str, dtype: str) -> None:
    t = _dispatch.builtin_table(Key("cpu", isa, dtype, 1))
    assert t.source == "builtin"
    only_float32 = {"sell"} if dtype != "float32" else set()
    assert set(t.surfaces) == set(_cost_model.FORMATS) - only_float32
    for batch in (1, 64, 1024) if dtype in ("float32", "float64") else ():
        assert _dispatch.choose(t, 2048, 2048, 2048 * 2048, batch)[0] == "dense"
    if dtype == "float32":
        for batch in (1, 64):
            assert _dispatch.choose(t, 2048, 2048, 2048 * 20, batch)[0] != "dense"


def test_prediction_is_fast_enough_for_a_first_call() -> None:
    from sapwood._measure import interleave

    calls = {"choose": lambda: _dispatch.choose(table(), 2048, 2048, 400_000, 64)}
    assert min(interleave(calls, rounds=20, seconds=0)["choose"]) < 1e-3


def test_a_busy_machine_keeps_the_builtin_table_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_calibrate, "measure", lambda key, dtype, seconds: (table(key=key), 0.4))
    with pytest.warns(UserWarning, match="too busy to measure .times vary by 40%."):
        chosen = _dispatch.table_for("cpu", torch.float32)
    assert chosen.source.startswith("builtin")
    assert _dispatch.table_for("cpu", torch.float32) is chosen
    assert not _dispatch.cache_file().exists()


def test_measurement_covers_the_grid_and_orders_the_obvious(
    monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    torch.set_num_threads(1)  # a second thread would wait for whatever else the machine does
    monkeypatch.setattr(_calibrate, "SIDES", (128, 512))
    monkeypatch.setattr(_calibrate, "BATCHES", (1, 8, 64))
    key = Key("cpu", _dispatch.cpu_isa(), "float32", 1)
    t, noise = _calibrate.measure(key, torch.float32, seconds=0.1)
    assert t.key == key
    assert noise >= 0
    assert t.surfaces["bitmap"].batches == (1, 8)
    assert t.surfaces["csr"].batches == (1, 8, 64)
    assert DispatchTable.from_json(t.to_json()) == t
    n = k = 512
    sparse, half = (_dispatch.predict(t, "csr", n, k, int(n * k * d), 64) for d in (0.01, 0.5))
    assert sparse < half
    assert _dispatch.predict(t, "dense", n, k, n * k, 64) > t.surfaces["dense"].overhead
