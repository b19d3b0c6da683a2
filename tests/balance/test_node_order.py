"""Ranks on other machines than the plan or the topology has them on are refused, on all ranks, with both orders."""

import pytest

from tests.rank_pool import pool


def problems(*args) -> list[str]:
    return pool(4).run(_problem, args)


def _problem(args: tuple) -> str:
    from tests.balance import figures_case

    figures_case.initialize_groups(4)
    return figures_case.node_order_problem(*args)


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
    assert problems(of_plan, of_topology, list(hosts)) == [""] * 4


@pytest.mark.parametrize(
    ("of_plan", "of_topology", "hosts", "messages"),
    [
        ([0, 0, 1, 1], None, "abab", ["--scalemoe-plan", "ranks 0-1 | ranks 2-3 in the file, ranks 0, 2 | ranks 1, 3 in this job"]),
        (None, [0, 0, 1, 1], "aaab", ["--scalemoe-topology", "ranks 0-2 | rank 3 in this job", "start the machines in the order"]),
        ([0, 0, 0, 1], [0, 0, 1, 1], "aaaa", ["--scalemoe-plan and --scalemoe-topology", "ranks 0-2 | rank 3 in the plan"]),
    ],
)
def test_refused(of_plan, of_topology, hosts, messages):
    found = problems(of_plan, of_topology, list(hosts))
    assert found == [found[0]] * 4
    assert all(message in found[0] for message in messages), found[0]
