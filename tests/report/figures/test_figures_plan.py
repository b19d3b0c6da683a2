import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.report.figures.plan import change_panel, convergence_panel, plan_change
from megatron_scalemoe.report.results import Curve
from tests.report import small_run
from tests.report.figures.svg import texts

NODES = np.array([0, 0, 1, 1])
CONTIGUOUS = PlacementPlan.contiguous(2, 4, 8)


def test_a_change_is_what_moved_counted_by_hand():
    change = plan_change("contiguous", CONTIGUOUS, "plan.json", small_run.plan(), NODES)
    assert change.stay.tolist() == [4, 8]
    assert change.inside.tolist() == [2, 0]
    assert change.between.tolist() == [2, 0]
    assert change.added.tolist() == [3, 3]
    assert change.dropped.tolist() == [0, 0]
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = 1
    np.testing.assert_array_equal(change.moved_GG, expected)


def test_counts_agree_with_a_count_expert_by_expert():
    rng = np.random.default_rng(3)
    plans = []
    for _ in range(2):
        home = np.stack([rng.permutation(np.repeat(np.arange(4), 3)) for _ in range(5)])
        hosts = home[:, :, None] == np.arange(4)
        for layer in range(5):
            for expert in rng.choice(12, size=4, replace=False):
                hosts[layer, expert, rng.integers(4)] = True
        plans.append(PlacementPlan.from_hosts(home, hosts, replica_slots_per_rank=4))
    change = plan_change("old", plans[0], "new", plans[1], NODES)
    for layer in range(5):
        counted = dict.fromkeys(("stay", "inside", "between", "added", "dropped"), 0)
        for expert in range(12):
            source, target = (int(plan.home_rank[layer, expert]) for plan in plans)
            counted["stay" if source == target else "inside" if NODES[source] == NODES[target] else "between"] += 1
            copies = [set(np.flatnonzero(p.hosts(layer)[expert]).tolist()) - {int(p.home_rank[layer, expert])} for p in plans]
            counted["added"] += len(copies[1] - copies[0])
            counted["dropped"] += len(copies[0] - copies[1])
        assert counted == {name: int(getattr(change, name)[layer]) for name in counted}


def test_the_title_says_how_much_moves():
    panel = change_panel(plan_change("contiguous", CONTIGUOUS, "plan.json", small_run.plan(), NODES))
    assert panel.title == "plan.json moves 4 of 16 homes (25%) from contiguous, 2 of them to another node, and adds 6 replicas"
    assert panel.table.rows == [["0", "4", "2", "2", "3", "0"], ["1", "8", "0", "0", "3", "0"]]
    assert {"home stays", "home moves to another node", "replica added", "MoE layer", "from rank", "to rank"} <= set(texts(panel.svg))


def test_equal_plans_move_nothing():
    panel = change_panel(plan_change("contiguous", CONTIGUOUS, "plan.json", CONTIGUOUS, NODES))
    assert panel.title == "plan.json places the experts exactly as contiguous"


def test_moves_between_many_ranks_are_drawn_in_blocks():
    home = np.roll(np.repeat(np.arange(200), 1), 1)[None]
    plan = PlacementPlan.from_hosts(home, home[:, :, None] == np.arange(200), replica_slots_per_rank=0)
    change = plan_change("contiguous", PlacementPlan.contiguous(1, 200, 200), "p", plan, np.arange(200) // 8)
    panel = change_panel(change)
    assert "homes that move, blocks of 4 ranks" in texts(panel.svg)
    assert panel.title.startswith("p moves 200 of 200 homes (100%)")


CURVES = [Curve(0, [(0.0, 300.0), (0.1, 150.0), (0.4, 110.0)], 100.0), Curve(1, [(0.0, 500.0), (0.3, 220.0)], 200.0)]


def test_convergence_is_told_against_the_lower_bound():
    panel = convergence_panel("p.json", CURVES, 0)
    assert panel.title == "The search brought the mean layer from 2.75x to 1.10x its lower bound; the longest took 0.4 s"
    assert panel.table.rows[0] == ["0", "300 µs", "110 µs", "100 µs", "10.0%", "0.400"]
    assert {"cost / lower bound", "lower bound: no placement is cheaper"} <= set(texts(panel.svg))


def test_without_bounds_convergence_is_told_in_ms():
    panel = convergence_panel("p.json", [CURVES[0], Curve(1, [(0.0, 500.0)], None)], 0)
    assert panel.title == "The search brought the mean layer from 0.4 ms to 0.305 ms; the longest took 0.4 s"
    assert "cost, ms per micro-batch" in texts(panel.svg)


def test_a_search_that_found_nothing_says_so():
    assert (
        convergence_panel("p", [Curve(0, [(0.0, 5.0)], None)], 0).title == "The search of 0 s a layer found nothing better than its start"
    )


def test_a_long_way_to_the_bound_is_drawn_on_a_log_axis_with_plain_numbers():
    panel = convergence_panel("p", [Curve(0, [(0.0, 950.0), (1.0, 110.0)], 100.0)], 0)
    assert {"1", "2", "5", "8"} <= set(texts(panel.svg))
    assert "mathdefault" not in panel.svg


def test_a_gap_that_rounds_below_zero_is_zero():
    assert convergence_panel("p", [Curve(0, [(0.0, 99.99)], 100.0)], 0).table.rows[0][4] == "0.0%"
