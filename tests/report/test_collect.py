import os

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import save_plan
from megatron_scalemoe.report.collect import collect
from tests.report import small_run
from tests.report.small_run import write_json, write_run
from tests.report.training import write_training


def test_files_are_recognised_by_what_is_in_them_whatever_their_names(tmp_path):
    write_run(tmp_path)
    for index, path in enumerate(sorted(tmp_path.iterdir())):
        path.rename(tmp_path / f"{index}-x{path.suffix}")
    run = collect(tmp_path)
    assert not run.damaged
    assert not run.unrecognised
    assert sorted(row.kind for row in run.files) == sorted(
        ["bench dispatch", "bench solvers", "compare", "plan", "plan result", "simulate", "topology", "trace"]
    )
    assert [len(items) for items in (run.topologies, run.traces, run.plans)] == [1, 1, 1]
    (trace,) = run.traces.values()
    assert trace.content_hash == small_run.trace().content_hash


@pytest.mark.parametrize("target", ["circle", "nowhere"])
def test_a_link_that_leads_nowhere_costs_itself_alone(target, tmp_path):
    write_run(tmp_path)
    (tmp_path / "circle").symlink_to(target)
    run = collect(tmp_path)
    assert [name for name, _ in run.damaged] == ["circle"]
    assert run.files


@pytest.mark.parametrize(
    "changes", [{"scalemoe_dispatch": 1e9}, {"scalemoe_replicas": "4"}, {"moe_dispatcher": None}, {"scalemoe_migrate": "no"}]
)
def test_options_of_the_wrong_type_damage_their_run(changes, tmp_path):
    write_training(tmp_path / "a", options=changes)
    write_training(tmp_path / "b")
    run = collect(tmp_path)
    assert [name for name, _ in run.damaged] == ["a"]
    assert [training.name for training in run.trainings] == ["b"]


def test_a_simulation_has_its_baseline_as_first_row(tmp_path):
    write_json(tmp_path / "s.json", small_run.simulate())
    rows = collect(tmp_path).results["simulate"][0].rows
    assert [row["policy"] for row in rows] == ["contiguous", "plan.json"]
    assert rows[1]["step_us"] == pytest.approx(0.6 * rows[0]["step_us"])


def test_a_simulation_of_the_baseline_is_one_row(tmp_path):
    write_json(tmp_path / "s.json", {**small_run.summary("contiguous", 1.0), "baseline": small_run.summary("contiguous", 1.0)})
    assert len(collect(tmp_path).results["simulate"][0].rows) == 1


def test_the_course_of_each_layers_search_is_read(tmp_path):
    write_json(tmp_path / "p.json", small_run.plan_result())
    first, second = collect(tmp_path).results["plan result"][0].curves
    assert first.points == [(0.0, 300.0), (0.1, 150.0), (0.4, 110.0)]
    assert (second.layer, second.lower_bound_us) == (1, 200.0)


def test_what_is_not_ours_is_listed_and_the_rest_is_read(tmp_path):
    write_run(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "config.yaml").write_text("a: [1, 2")
    write_json(tmp_path / "other.json", {"rows": []})
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "folder").mkdir()
    run = collect(tmp_path)
    assert run.unrecognised == ["config.yaml", "notes.md", "other.json"]
    assert not run.damaged
    assert len(run.files) == 8


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"rows": [{"policy": "x",\n "step_us": 3}]}', "a.json:1: rows.0: 'dispatch_us' is missing"),
        ("a.json", b'{"rows": [\n{"policy": 7, "step_us": 3}]}', "a.json:2: rows.0.policy: must be text"),
        ("a.json", b'{"step_us": -1, "dispatch_us": 0, "combine_us": 0, "compute_us": 0}', "step_us: must be 0 or more"),
        ("a.json", b'{"step_us": 1e999, "dispatch_us": 0, "combine_us": 0, "compute_us": 0}', "step_us: must be a finite number"),
        ("a.json", b'{"solver": "s", "cost_us": 1, "layers": [{"history": [[1]]}]}', "layers.0.history.0: must be 2 items"),
        ("a.json", b'{"solver": "s", "cost_us": 1, "layers": [3]}', "layers.0: must be a mapping"),
        ("a.json", b'{"rows": [{"policy": "x"', "a.json:1: not valid JSON"),
        ("a.json", b"\xff\xfe", "not a text file"),
        ("a.yaml", b"builder: no_such\nschema_version: 1", "a.yaml:1: builder"),
        ("a.npz", b"PK\x03\x04 and no more", "a.npz"),
        ("renamed.bin", b"PK\x03\x04 and no more", "renamed.bin"),
    ],
)
def test_a_damaged_file_is_named_with_its_error_and_the_rest_is_read(tmp_path, name, content, said):
    write_json(tmp_path / "z.json", small_run.compare())
    (tmp_path / name).write_bytes(content)
    run = collect(tmp_path)
    ((damaged, error),) = run.damaged
    assert damaged == name
    assert said in error
    assert [row.name for row in run.files] == ["z.json"]


def test_an_empty_directory_is_an_error_that_says_what_to_put_there(tmp_path):
    with pytest.raises(ScaleMoEError, match=r"(?s)nothing to report.*no files.*scalemoe compare"):
        collect(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ScaleMoEError, match="nothing of it among 1 files"):
        collect(tmp_path)


def test_the_report_itself_is_no_input(tmp_path):
    write_json(tmp_path / "c.json", small_run.compare())
    (tmp_path / "report.html").write_text("<html>")
    assert not collect(tmp_path, ignore=tmp_path / "report.html").unrecognised
    assert collect(tmp_path).unrecognised == ["report.html"]


def test_a_name_that_is_no_text_can_still_be_written(tmp_path):
    save_plan(small_run.plan(), tmp_path / "plan.json")
    os.rename(tmp_path / "plan.json", os.fsencode(tmp_path) + b"/pl\xffan.json")
    (name,) = collect(tmp_path).plans
    assert name.encode("utf-8") == b"pl?an.json"


def test_a_gap_just_below_zero_is_rounding_and_no_damage(tmp_path):
    write_json(tmp_path / "p.json", {**small_run.plan_result(), "gap": -1e-12})
    assert not collect(tmp_path).damaged
