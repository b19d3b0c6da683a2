"""Ranks on other machines than the plan or the topology has them on are refused, on all ranks, with both orders."""

import pytest

from megatron_scalemoe.balance.node_order import check_nodes
from megatron_scalemoe.errors import ScaleMoEError
from tests.rank_pool import pool


@pytest.mark.parametrize(
    ("of_plan", "of_topology", "hosts"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], "aabb"),
        ([0, 0, 1, 1], None, "bbaa"),  # names do not matter, nor which node is first
        (None, [0, 1, 2, 3], "abcd"),
        ([0, 0, 1, 1], [0, 0, 1, 1], "aaaa"),  # a trial on one machine
        (None, None, "abab"),
    ],
)
def test_fits(of_plan, of_topology, hosts):
    check_nodes(of_plan, of_topology, hosts)


@pytest.mark.parametrize(
    ("of_plan", "of_topology", "hosts", "messages"),
    [
        ([0, 0, 1, 1], None, "abab", ["--scalemoe-plan", "ranks 0-1 | ranks 2-3 in the file, ranks 0, 2 | ranks 1, 3 in this job"]),
        (None, [0, 0, 1, 1], "aaab", ["--scalemoe-topology", "ranks 0-2 | rank 3 in this job"]),
        ([0, 0, 0, 1], [0, 0, 1, 1], "aaaa", ["--scalemoe-plan and --scalemoe-topology", "ranks 0-2 | rank 3 in the plan"]),
    ],
)
def test_refused(of_plan, of_topology, hosts, messages):
    with pytest.raises(ScaleMoEError) as caught:
        check_nodes(of_plan, of_topology, hosts)
    assert all(message in str(caught.value) for message in messages), caught.value


def problem(*args) -> str:
    from tests.balance import metrics_case

    return metrics_case.node_order_problem(*args)


def test_all_ranks_are_told():
    found = pool(4).run(problem, [0, 0, 1, 1], None, "abab")
    assert found == [found[0]] * 4
    assert "ranks 0, 2 | ranks 1, 3 in this job" in found[0]
    assert pool(4).run(problem, [0, 0, 1, 1], [0, 0, 1, 1], "aabb") == [""] * 4
