"""A planner that cannot start, answer or be read costs a plan, on all ranks alike, and never the training."""

from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.trace import RoutingTrace
from tests.rank_pool import pool

FULL = OSError(28, "No space left on device")
FAULTS = {
    "no temporary directory": ("tempfile.mkdtemp", FULL),
    "no room for the trace": (
        "megatron_scalemoe.placement.replan.background.save_trace",
        ScaleMoEError("cannot write the file", found=FULL),
    ),
    "no process": ("subprocess.Popen", BlockingIOError(11, "Resource temporarily unavailable")),
    "no answer in time": (BackgroundPlanner, "wait", ScaleMoEError("the planner must answer in time")),
    "an answer that cannot be read": (BackgroundPlanner, "poll", FULL),
}


def planned_with(fault: str) -> tuple[str, bool, bool]:
    """What `take` says on this rank, whether the planner is free again, and whether the next question is answered."""
    from tests.mcore import megatron_case  # noqa: F401, I001 - first: it installs the CPU ranks

    from megatron_scalemoe.balance.planner import StagePlanner
    from tests.placement.replan.test_replan import COST, PORTS

    trace = RoutingTrace(np.ones((1, 1, PORTS.node_of_rank.size, 8), dtype=np.int32))
    plan = PlacementPlan.contiguous(1, PORTS.node_of_rank.size, 8)
    planner = StagePlanner(dist.group.WORLD, PORTS, COST, migrate=False)
    *target, error = FAULTS[fault]
    said = ""
    with mock.patch.object(*target, side_effect=error) if len(target) == 2 else mock.patch(*target, side_effect=error):
        planner.ask(1, trace, plan, 0.0)
        planner.wait()
        try:
            planner.take()
        except ScaleMoEError as caught:
            said = str(caught)
    free = not planner.busy
    planner.close()
    planner.ask(2, trace, plan, 0.0)
    planner.wait()
    answered = planner.take() is not None
    planner.close()
    return said, free, answered


@pytest.mark.parametrize("fault", FAULTS)
def test_no_plan_is_the_same_news_on_all_ranks(fault):
    found = pool(2).run(planned_with, fault)
    assert found[0] == found[1]
    said, free, answered = found[0]
    assert said and free and answered
