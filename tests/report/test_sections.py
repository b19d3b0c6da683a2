import dataclasses

import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.report.collect import Run, collect
from megatron_scalemoe.report.figures.trace import NO_TOKENS
from megatron_scalemoe.report.sections import choose, tell
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.traffic.trace import RoutingTrace
from tests.report import small_run
from tests.report.small_run import write_json, write_run


def story_of(run, **cost):
    return tell(run, CostModel(**cost), progress=lambda _: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return story_of(collect(write_run(tmp_path_factory.mktemp("run"))))


def test_a_whole_run_has_every_section(whole):
    assert [section.id for section in whole.sections] == ["policies", "balance", "network", "plans", "traffic", "measured"]
    assert [len(section.panels) for section in whole.sections] == [2, 1, 2, 2, 1, 2]
    assert not whole.warnings


def test_every_figure_has_a_title_a_description_and_numbers(whole):
    for panel in (panel for section in whole.sections for panel in section.panels):
        assert len(panel.title) > 20
        assert len(panel.alt) > 40
        assert panel.table.rows
        assert all(len(row) == len(panel.table.headers) for row in panel.table.rows)


def test_the_summary_is_the_comparisons_finding(whole):
    assert whole.summary == "memetic takes 455 µs where contiguous takes 910 µs, 2.00x as fast; 13.8% above the lower bound."
    assert [(tile.name, tile.value) for tile in whole.tiles[:2]] == [("step", "455 µs"), ("max/mean rank load", "2.50")]
    assert whole.tiles[0].before == "910 µs contiguous"


def test_without_results_the_summary_is_what_the_page_computed():
    run = Run(directory="d", traces={"t": small_run.trace()}, plans={"p": small_run.plan()})
    story = story_of(run)
    assert story.summary.startswith("p brings max/mean rank load from 2.3")
    assert "against the contiguous placement" in story.summary
    run = dataclasses.replace(run, topologies={"y": small_run.topology()})
    assert "and the MoE layers of a micro-batch from" in story_of(run).summary
    assert [tile.name for tile in story_of(run).tiles] == ["step", "max/mean rank load", "bytes between nodes"]


def test_experts_without_tokens_keep_their_grey():
    counts = small_run.trace().counts.copy()
    counts[..., 2] = 0
    run = Run(directory="d", traces={"t": RoutingTrace(counts)})
    assert NO_TOKENS in story_of(run).sections[-1].panels[0].svg


def test_a_plan_alone_is_compared_with_contiguous():
    story = story_of(Run(directory="d", plans={"p": small_run.plan()}))
    assert [section.id for section in story.sections] == ["plans"]
    assert story.summary.startswith("Nothing to compare yet")


def test_a_topology_alone_is_described():
    (section,) = story_of(Run(directory="d", topologies={"y": small_run.topology()})).sections
    assert "4 GPUs in 2 nodes" in section.lead


def test_of_several_plans_the_cheapest_is_drawn():
    trace, contiguous = small_run.trace(), PlacementPlan.contiguous(2, 4, 8)
    run = Run(directory="d", traces={"t": trace}, plans={"good": small_run.plan(), "same": contiguous})
    balance, plans, _ = story_of(run).sections
    assert "with good the worst of all layers" in balance.panels[0].title
    assert "good moves" in plans.panels[0].title
    assert [row[0] for row in plans.tables[0].rows] == ["contiguous", "same", "good"]


def test_simulations_against_one_baseline_share_a_figure(tmp_path):
    write_json(tmp_path / "a.json", small_run.simulate())
    write_json(tmp_path / "b.json", {**small_run.simulate(), "step_us": 700.0})
    other = {**small_run.simulate(), "baseline": small_run.summary("contiguous", 2.0)}
    write_json(tmp_path / "c.json", other)
    (section,) = story_of(collect(tmp_path)).sections
    first, second = section.panels
    assert [row[0] for row in first.table.rows] == ["contiguous", "plan.json (a.json)", "plan.json (b.json)"]
    assert [row[0] for row in second.table.rows] == ["contiguous", "plan.json"]


def test_of_a_larger_topology_the_first_gpus_are_used():
    large = build_topology("rail_optimized", {"nodes": 4, "gpus_per_node": 2})
    inputs = choose(Run(directory="d", topologies={"y": large}, traces={"t": small_run.trace()}))
    assert inputs.topology.num_ranks == 4
    assert "y has 8 GPUs, t 4 ranks" in inputs.warnings[0]


def test_what_does_not_fit_is_warned_of_and_left_out():
    small = build_topology("rail_optimized", {"nodes": 1, "gpus_per_node": 2})
    other_trace, other_plan = small_run.trace(hot=1), PlacementPlan.contiguous(3, 4, 8)
    run = Run(
        directory="d",
        topologies={"small": small, "y": small_run.topology(), "z": small_run.topology()},
        traces={"t": other_trace, "u": small_run.trace()},
        plans={"p": small_run.plan(), "q": other_plan},
    )
    inputs = choose(run)
    assert inputs.trace is other_trace
    assert inputs.topology is run.topologies["y"]
    assert list(inputs.plans) == ["p"]
    said = "\n".join(inputs.warnings)
    for part in (
        "trace t; not used: u",
        "small has 2 GPUs",
        "topology y; not used: z",
        "q is for 3 layers",
        "p was made from another trace than the one shown",
    ):
        assert part in said
    assert len(inputs.warnings) == 5


def test_a_trace_that_no_placement_fits_is_still_shown():
    trace = RoutingTrace(np.full((1, 1, 4, 6), 5))
    story = story_of(Run(directory="d", traces={"t": trace}, topologies={"y": small_run.topology()}))
    assert [section.id for section in story.sections] == ["network", "traffic"]
    assert "not a multiple of its ranks" in story.warnings[0]


def test_an_exchange_that_the_topology_does_not_allow_costs_only_the_network_figure():
    uneven = build_topology("rail_optimized", {"nodes": 2, "gpus_per_node": 3}).subset(4)
    run = Run(directory="d", traces={"t": small_run.trace()}, topologies={"y": uneven}, plans={"p": small_run.plan()})
    story = story_of(run, exchange="2dh")
    assert any("The network's load is left out" in warning for warning in story.warnings)
    by_id = {section.id: section for section in story.sections}
    assert by_id["balance"].panels
    assert [panel.title[:8] for panel in by_id["network"].panels] == ["Two GPUs"]
