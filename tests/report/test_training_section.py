import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.report.collect import collect
from megatron_scalemoe.report.sections import tell
from tests.report import small_run
from tests.report.figures.svg import texts
from tests.report.small_run import write_json
from tests.report.training import history, replan, write_stages, write_training


def story_of(directory):
    return tell(collect(directory), CostModel(), progress=lambda _: None)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return story_of(write_stages(tmp_path_factory.mktemp("stages") / "logs"))


def test_the_summary_has_speed_against_both_baselines_and_the_loss(stages):
    assert stages.summary == (
        "ga trains 1,500 tokens/s, 1.50x stock and 3.00x baseline. "
        "At equal iterations no loss is more than 2.0e-06 from stock's (the farthest: ga)."
    )
    assert [(tile.name, tile.value) for tile in stages.tiles] == [
        ("tokens/s, measured", "1,500"),
        ("max/mean rank load", "1.10"),
        ("largest loss difference", "2.0e-06"),
    ]
    assert not stages.warnings


def test_the_section_says_what_was_measured_on(stages):
    (section,) = stages.sections
    assert "on Some CPU, 2 cores, Linux x86_64, torch 2.13.0" in section.lead
    assert "expert-parallel size 2" in section.lead
    assert [panel.title[:12] for panel in section.panels] == ["ga trains 1,", "At equal ite", "The busiest "]


def test_the_table_has_a_row_for_each_run(stages):
    table = stages.sections[0].panels[0].table
    rows = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    assert [row["run"] for row in rows] == ["stock", "baseline", "adaptive", "ga"]
    assert [row["speed"] for row in rows] == ["1.00x", "0.50x", "1.10x", "1.50x"]
    assert [row["loss difference"] for row in rows] == ["–", "0", "0", "2.0e-06"]
    assert [row["max/mean load"] for row in rows] == ["–", "–", "1.500", "1.100"]
    ga = rows[-1]
    assert (ga["replicas, ms"], ga["replanning, ms"], ga["new plans"], ga["moves"]) == ("3.0", "1.0", "1 of 1", "3")
    assert ga["final loss"] == "2.000001"


def test_pictures_name_every_run_and_the_new_plans(stages):
    speed, loss, balance = stages.sections[0].panels
    assert {"stock", "baseline", "adaptive", "ga", "1,500, 1.50x"} <= set(texts(speed.svg))
    assert {"stock", "ga", "difference to stock"} <= set(texts(loss.svg))
    assert {"adaptive", "ga", "ga: new plan"} <= set(texts(balance.svg))
    assert not {"stock", "baseline"} & set(texts(balance.svg))
    assert "Not drawn: baseline" in balance.note
    assert "in ga, after 1 new plan, 1.50x in adaptive" in balance.title


def test_no_label_is_left_as_mathematics(stages):
    assert not [text for panel in stages.sections[0].panels for text in texts(panel.svg) if "$" in text]


def test_equal_losses_are_told_and_drawn(tmp_path):
    for name in ("a", "b"):
        write_training(tmp_path / name)
    story = story_of(tmp_path)
    assert "All losses are the same as a's to the last bit" in story.summary
    assert "none: equal to the last bit" in texts(story.sections[0].panels[1].svg)


def test_one_run_is_shown_alone(tmp_path):
    story = story_of(write_training(tmp_path / "only", events=[replan(12, changed=True)]))
    assert story.summary == "only trains 1,000 tokens/s. only ends at loss 2.0000 after 40 iterations."
    assert len(story.sections[0].panels) == 3


def test_without_any_load_there_is_no_balance_figure(tmp_path):
    write_training(tmp_path / "a", options={"moe_dispatcher": "stock"}, history=history([2.0, 1.0], load=None))
    assert len(story_of(tmp_path).sections[0].panels) == 2


def test_runs_without_equal_iterations_say_so(tmp_path):
    write_training(tmp_path / "a", history=history([2.0, 1.0], step=10))
    write_training(tmp_path / "b", history=history([2.0, 1.0], step=7))
    table = story_of(tmp_path).sections[0].panels[0].table
    assert table.rows[1][table.headers.index("loss difference")] == "no equal iterations"


def test_what_makes_runs_incomparable_is_warned_of(tmp_path):
    write_training(tmp_path / "a")
    write_training(tmp_path / "b", options={"lr": 9.0})
    failed = {"event": "planner failed", "iteration": 3, "reason": "no plan"}
    write_training(tmp_path / "c", options={"scalemoe_force_skew": 1.2}, events=[failed, failed])
    said = "\n".join(story_of(tmp_path).warnings)
    for part in ("b and a differ in lr", "c draws its experts", "c: planner failed at iteration 3: no plan, and 1 more like it"):
        assert part in said


def test_a_damaged_run_is_named_and_the_others_are_reported(tmp_path):
    write_stages(tmp_path)
    (tmp_path / "ga" / "train.json").write_text('{"schema_version": 1,\n "history": [{"iteration": 1, "lm_loss": "x"')
    (tmp_path / "adaptive" / "train.json").unlink()
    run = collect(tmp_path)
    assert [training.name for training in run.trainings] == ["baseline", "stock"]
    assert [name for name, _ in run.damaged] == ["adaptive", "ga"]
    assert "which is written at its end" in run.damaged[0][1]
    assert "ga/train.json:2: not valid JSON" in run.damaged[1][1]


def test_the_directory_may_be_the_run_itself(tmp_path):
    folder = write_training(tmp_path / "run-3")
    run = collect(folder)
    assert [training.name for training in run.trainings] == ["run-3"]
    assert [(row.name, row.kind) for row in run.files] == [("config.json", "training run"), ("train.json", "training run")]
    assert not run.unrecognised


def test_measured_runs_come_before_computed_policies(tmp_path):
    write_stages(tmp_path)
    write_json(tmp_path / "compare.json", small_run.compare())
    story = story_of(tmp_path)
    assert [section.id for section in story.sections] == ["training", "policies"]
    assert story.summary.startswith("ga trains")


def test_stock_in_other_micro_batches_is_the_yardstick_and_no_rival(tmp_path):
    write_stages(tmp_path)
    options = {"moe_dispatcher": "stock", "micro_batch_size": 4}
    apart = history([4.0, 3.0, 2.5, 2.0 + 5e-6], tokens_per_s=[9000.0] * 4, load=None)
    write_training(tmp_path / "stock_rounding", options=options, history=apart)
    story = story_of(tmp_path)
    assert story.summary.startswith(
        "ga trains 1,500 tokens/s, 1.50x stock and 3.00x baseline. At equal iterations no loss is more than 2.0e-06"
    )
    assert story.summary.endswith("(the farthest: ga); rounding alone takes stock_rounding 5.0e-06 away.")
    assert story.tiles[-1].before == "ga to stock; 5.0e-06 stock_rounding, by rounding alone"
    speed, loss, _ = story.sections[0].panels
    assert "stock_rounding" not in texts(speed.svg)
    assert "stock_rounding" in texts(loss.svg)
    assert "stock_rounding" in [row[0] for row in speed.table.rows]
    assert not story.warnings
