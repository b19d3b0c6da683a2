import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.report.evaluate import Evaluation
from megatron_scalemoe.report.figures.load import link_panel, load_panel
from tests.report.figures.svg import texts

PLAN = PlacementPlan.contiguous(2, 4, 8)
BEFORE = Evaluation(
    name="contiguous", plan=PLAN, load=np.array([[10.0, 10, 10, 10], [10, 10, 60, 0]]), link_us=np.array([3000.0, 1000, 500])
)
AFTER = Evaluation(name="plan.json", plan=PLAN, load=np.array([[10.0, 10, 9, 11], [20, 20, 20, 20]]), link_us=np.array([800.0, 1200, 500]))
LINKS = [("a", "b"), ("b", "a"), ("b", "c")]


def test_the_title_names_who_waits_for_whom_and_what_the_plan_changes():
    panel = load_panel([BEFORE, AFTER])
    expected = "In layer 1 all wait for rank 2, which gets 3.00x the mean load; with plan.json the worst of all layers is 1.10x"
    assert panel.title == expected
    assert panel.table.headers == ["layer", "max/mean, contiguous", "busiest rank", "max/mean, plan.json", "busiest rank"]
    assert panel.table.rows == [["0", "1.00", "0", "1.10", "3"], ["1", "3.00", "2", "1.00", "0"]]
    assert {"rank", "MoE layer", "rank's load / layer's mean", "contiguous: worst layer 3.00"} <= set(texts(panel.svg))
    assert "contiguous: max/mean 2.00 on average over layers, 3.00 at worst" in panel.alt


def test_without_a_plan_the_contiguous_placement_stands_alone():
    panel = load_panel([BEFORE])
    assert panel.title == "In layer 1 all wait for rank 2, which gets 3.00x the mean load under the contiguous placement"
    assert len(panel.table.headers) == 3


def test_balanced_ranks_wait_for_no_one():
    even = Evaluation(name="contiguous", plan=PLAN, load=np.full((2, 4), 5.0))
    assert load_panel([even]).title == "All ranks carry the same load under contiguous"


def test_ranks_without_load_are_drawn():
    assert load_panel([Evaluation(name="contiguous", plan=PLAN, load=np.zeros((2, 4)))]).svg


def test_the_busiest_links_come_first_with_their_times():
    panel = link_panel([BEFORE, AFTER], LINKS)
    assert panel.title == ("The busiest link, a → b, works 3.00 ms per micro-batch; with plan.json the busiest, b → a, works 1.20 ms")
    assert panel.table.rows == [["a → b", "3.000", "0.800"], ["b → a", "1.000", "1.200"], ["b → c", "0.500", "0.500"]]
    assert {"a → b", "busy, ms per micro-batch", "all 3 links", "the 3 busiest links", "plan.json"} <= set(texts(panel.svg))


def test_idle_links_are_no_finding():
    idle = Evaluation(name="contiguous", plan=PLAN, load=BEFORE.load, link_us=np.zeros(3))
    assert link_panel([idle], LINKS).title == "No link carries anything"


def test_of_many_links_the_ten_busiest_are_named():
    time_us = np.arange(5000.0)
    many = Evaluation(name="contiguous", plan=PLAN, load=BEFORE.load, link_us=time_us)
    panel = link_panel([many], [(f"s{i}", "t") for i in range(5000)])
    assert [row[0] for row in panel.table.rows] == [f"s{i} → t" for i in range(4999, 4989, -1)]
    assert len(panel.svg) < 60_000
