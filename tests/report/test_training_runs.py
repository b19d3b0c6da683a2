import json
import math

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.report.training_runs import (
    differing_options,
    fastest,
    in_order,
    is_run_folder,
    loss_difference,
    read_training_run,
)
from tests.report.training import config, history, interval, replan, write_training


def read(folder, **changes):
    return read_training_run(write_training(folder, **changes), folder.name)


def test_reports_and_validation_are_read(tmp_path):
    run = read(tmp_path / "a", history=history([4.0, 3.0, 2.0, 1.0], tokens_per_s=[10, 20, 30, 40], load=[2.0, 1.5, 1.2, 1.1]))
    assert run.iteration_N.tolist() == [10, 20, 30, 40]
    assert run.lm_loss_N.tolist() == [4.0, 3.0, 2.0, 1.0]
    assert run.load() == pytest.approx(1.15)
    assert run.validation == [(40, 1.5)]


def test_speed_is_of_the_second_half_and_the_mean_counts_pauses(tmp_path):
    run = read(tmp_path / "a", history=history([1.0] * 8, tokens_per_s=[1, 1, 1, 1, 100, 100, 25, 100]))
    median, low, high, mean = run.speed()
    assert median == high == 100
    assert 25 < low < 100
    assert mean == pytest.approx(4 / (3 / 100 + 1 / 25))


def test_a_run_of_one_report_has_figures(tmp_path):
    run = read(tmp_path / "a", history=history([1.0], tokens_per_s=[7]))
    assert run.speed() == (7, 7, 7, pytest.approx(7))
    assert run.mean_ms("replica_ms") is None


def test_live_balance_is_read(tmp_path):
    events = [interval(10, replica_ms=9.0), replan(12, changed=True, moved_homes=2), interval(30, replica_ms=2.0, steps=5)]
    events += [
        replan(32, changed=False),
        interval(40, replica_ms=4.0, steps=15),
        {"event": "planner failed", "iteration": 33, "reason": "a\n b"},
    ]
    run = read(tmp_path / "a", events=events)
    assert run.mean_ms("replica_ms") == pytest.approx((2 * 5 + 4 * 15) / 20)
    assert run.locality() == (pytest.approx(0.5), pytest.approx(0.25))
    assert [(plan.iteration, plan.moved_homes) for plan in run.new_plans] == [(12, 2)]
    assert len(run.replans) == 2
    assert run.failures == ["planner failed at iteration 33: a b"]


def test_unmeasured_shares_are_none(tmp_path):
    without = {name: value for name, value in interval(40).items() if name != "local_share"}
    assert read(tmp_path / "a", events=[without]).locality() is None
    assert read(tmp_path / "b", events=[{**without, "local_share": None}]).locality() is None


def test_padding_tells_no_load(tmp_path):
    run = read(tmp_path / "a", options={"scalemoe_dispatch": "padded"}, events=[interval(40)])
    assert run.load() is None
    assert not run.intervals
    assert run.is_baseline


def test_losses_are_compared_at_equal_iterations(tmp_path):
    reference = read(tmp_path / "a", history=history([4.0, 3.0, 2.0, 1.0]))
    run = read(tmp_path / "b", history=history([3.5, 1.0], step=20))
    iterations, difference = loss_difference(run, reference)
    assert iterations.tolist() == [20, 40]
    assert difference == pytest.approx([0.5, 0.0])


def test_baselines_come_first_then_the_more_that_is_on_the_later(tmp_path):
    stages = {
        "ga": {"scalemoe_replicas": 8, "scalemoe_migrate": True},
        "adaptive": {},
        "stock": {"moe_dispatcher": "stock"},
        "kmeans": {"scalemoe_replicas": 8, "scalemoe_sequence_placement": "affinity"},
        "baseline": {"scalemoe_dispatch": "padded"},
    }
    runs = [read(tmp_path / name, options=options) for name, options in stages.items()]
    assert [run.name for run in in_order(runs)] == ["stock", "baseline", "adaptive", "kmeans", "ga"]
    assert [run.techniques for run in in_order(runs)] == [
        "stock alltoall",
        "padded",
        "ragged",
        "ragged + 8 replicas + sequences",
        "ragged + 8 replicas + migration",
    ]


def test_the_fastest_is_by_the_median(tmp_path):
    slow = read(tmp_path / "a", history=history([1.0] * 4, tokens_per_s=[1, 1, 10, 10]))
    fast = read(tmp_path / "b", history=history([1.0] * 4, tokens_per_s=[1, 1, 20, 20]))
    assert fastest([slow, fast]) is fast


def test_options_that_change_the_loss_are_told_and_ours_are_not(tmp_path):
    run = read(tmp_path / "a")
    ours = read(tmp_path / "b", options={"scalemoe_replicas": 8, "run_name": "b", "save": "x"})
    other = read(tmp_path / "c", options={"lr": 1.0, "seed": 7})
    assert differing_options(ours, run) == []
    assert differing_options(other, run) == ["lr", "seed"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train.json", '{"schema_version": 1, "history": [', "train.json:1: not valid JSON"),
        ("train.json", '{"schema_version": 1, "history": []}', "train.json:1: history: reports no training step"),
        ("train.json", '{"schema_version": 2, "history": []}', "schema_version: must be 1"),
        ("train.json", '{"schema_version": 1, "history": [{"lm_loss": 1, "tokens_per_s": 2}]}', "history.0: 'iteration' is missing"),
        ("train.json", '{"schema_version": 1, "history": [{"iteration": 1, "lm_loss": 1, "tokens_per_s": 0}]}', "must be above 0"),
        ("train.json", '{"schema_version": 1, "history": [3]}', "history.0: must be a mapping"),
        ("config.json", '{"schema_version": 1, "args": {}, "env": {}}', "args: 'moe_dispatcher' is missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, said):
    folder = write_training(tmp_path / "a")
    (folder / file).write_text(content)
    with pytest.raises(ScaleMoEError) as error:
        read_training_run(folder, "a")
    assert said in str(error.value)
    assert file in str(error.value)


def test_iterations_that_do_not_increase_are_refused(tmp_path):
    records = history([1.0, 1.0])
    records[1]["iteration"] = records[0]["iteration"]
    with pytest.raises(ScaleMoEError, match=r"history\.1\.iteration: iterations must begin at 1 or later and increase"):
        read(tmp_path / "a", history=records)


def test_a_damaged_event_is_named(tmp_path):
    with pytest.raises(ScaleMoEError, match=r"events\.1: 'took_s' is missing"):
        read(
            tmp_path / "a",
            events=[interval(10), {"event": "replan", "iteration": 3, "changed": True, "moved_homes": 1, "replicas_added": 1}],
        )


def test_an_unfinished_run_says_so(tmp_path):
    folder = write_training(tmp_path / "a")
    (folder / "train.json").unlink()
    assert is_run_folder(folder)
    with pytest.raises(ScaleMoEError, match=r"(?s)no train\.json, which is written at its end.*let it finish"):
        read_training_run(folder, "a")


def test_other_folders_are_none(tmp_path):
    assert not is_run_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not is_run_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mine": 1}))
    assert not is_run_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert is_run_folder(tmp_path)


def test_a_run_without_load_has_none(tmp_path):
    run = read(tmp_path / "a", history=history([2.0, 1.0], load=None))
    assert run.load() is None
    assert all(math.isnan(load) for load in run.load_N)
    assert run.load_N.dtype == np.float64
