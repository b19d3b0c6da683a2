import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.calibrate import fit_bench, fit_exchange
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError

SIZES = np.array([1e4, 1e5, 1e6, 1e7])


def bench_file(path, rows):
    """As `bench dispatch` writes it: the sum of four exchanges, bytes of all ranks, and another dispatcher beside."""
    row = {"ranks": 4, "dispatcher": "scalemoe"}
    content = [{**row, "bytes_out": int(size * 4 * 4), "median_ms": time_us * 4 / 1e3} for size, time_us in rows]
    path.write_text(json.dumps({"rows": [{**row, "dispatcher": "alltoall", "bytes_out": 1, "median_ms": 1.0}, *content]}))
    return path


@settings(deadline=None)
@given(st.floats(0, 1e3), st.floats(0.1, 500))
def test_exact_times_give_back_overhead_and_bandwidth(overhead_us, bandwidth_GBps):
    fit = fit_exchange(SIZES, overhead_us + SIZES / bandwidth_GBps / 1e3)
    assert fit.overhead_us == pytest.approx(overhead_us, rel=1e-6, abs=1e-6)
    assert fit.bandwidth_GBps == pytest.approx(bandwidth_GBps, rel=1e-6)
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-9)


def test_noisy_times_are_fitted_as_well_as_any_other_overhead_and_bandwidth_would():
    rng = np.random.default_rng(0)
    times = (50 + SIZES / 10e3) * rng.uniform(0.9, 1.1, SIZES.size)
    fit = fit_exchange(SIZES, times)
    assert np.abs(fit.residuals).max() < 0.15
    for overhead_us in np.linspace(0, 100, 51):
        for bandwidth_GBps in np.linspace(5, 15, 51):
            other = (overhead_us + SIZES / bandwidth_GBps / 1e3) / times - 1
            assert (fit.residuals**2).sum() <= (other**2).sum() + 1e-12


def test_times_that_do_not_grow_are_all_overhead():
    fit = fit_exchange(SIZES, np.array([20.0, 20.0, 20.0, 20.0]))
    assert (fit.overhead_us, fit.bandwidth_GBps) == (pytest.approx(20), float("inf"))


def test_bench_files_are_fitted_together_for_one_exchange_and_one_rank(tmp_path):
    files = [bench_file(tmp_path / f"{i}.json", [(size, 30 + size / 2e3)]) for i, size in enumerate(SIZES)]
    fit = fit_bench(files)
    assert (fit.overhead_us, fit.bandwidth_GBps) == (pytest.approx(30), pytest.approx(2))
    assert fit.apply(CostModel(hidden_size=7)) == CostModel(hidden_size=7, exchange_overhead_us=fit.overhead_us)


def test_rows_that_no_meter_saw_are_left_out(tmp_path):
    files = [bench_file(tmp_path / f"{i}.json", [(size, 30 + size / 2e3)]) for i, size in enumerate(SIZES)]
    expected = fit_bench(files)
    for path in files:
        document = json.loads(path.read_text())
        document["rows"].append({**document["rows"][0], "transport": "shm", "bytes_out": 0, "median_ms": 1.0})
        path.write_text(json.dumps(document))
    assert fit_bench(files).overhead_us == expected.overhead_us


@pytest.mark.parametrize("times", [[0.0, 1.0], [float("nan"), 1.0], [-1.0, 1.0]])
def test_impossible_times_are_refused(times):
    with pytest.raises(ScaleMoEError, match="timed above 0"):
        fit_exchange(np.array([1.0, 2.0]), np.array(times))


def test_one_size_is_not_enough(tmp_path):
    path = bench_file(tmp_path / "one.json", [(1e6, 100), (1e6, 110)])
    with pytest.raises(ScaleMoEError, match=r"two or more sizes[^$]*1 in .*one\.json"):
        fit_bench([path])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"rows": 3}', "rows: must be a list"),
        ('{"rows": [{"dispatcher": "scalemoe", "ranks": 0, "median_ms": 1}]}', "rows.0.ranks: must be 1 or more"),
        ('{"rows": [{"dispatcher": "scalemoe", "ranks": 2, "median_ms": NaN}]}', "bench.json"),
        ("{}", "'rows' is missing"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, content, place):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ScaleMoEError, match=place):
        fit_bench([path])
