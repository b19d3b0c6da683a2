"""The planner of a pipeline stage: its first rank has the planner's process, and all ranks hear of the answer at the same step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from megatron_scalemoe.placement.replan.policy import ReplanPolicy
from megatron_scalemoe.placement.replan.replan import Replan, ReplanOptions
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.trace import RoutingTrace

# Of the planner, for all layers of a stage.
PLANNING_S = 2.0
# Iterations between two looks for an answer, which is a broadcast, once the first have passed.
_LOOK_EVERY = 8
_WAITING, _FAILED, _READY = range(3)


class StagePlanner:
    """Owns the planner's process on the first rank of `stage`. All ranks of it call each method together."""

    def __init__(self, stage: dist.ProcessGroup, ports: Ports, cost: CostModel, *, migrate: bool):
        self._stage, self._ports, self._cost, self._migrate = stage, ports, cost, migrate
        self._beside = BackgroundPlanner() if stage.rank() == 0 else None
        self.asked_at: int | None = None  # iteration of the question that is open
        self._failure = ""  # why no answer will come; on the first rank

    @property
    def busy(self) -> bool:
        """Whether a plan was asked for and not yet taken."""
        return self.asked_at is not None

    def ask(self, iteration: int, trace: RoutingTrace, old: PlacementPlan, unpaid_us: float) -> None:
        """Ask for the plan to follow `old`. unpaid_us: of earlier migrations, what they have not saved yet. Never raises: `take` does."""
        self.asked_at = iteration
        if self._beside is None:
            return
        options = ReplanOptions(
            replicas=(old.slots_per_rank - old.homes_per_rank) * old.num_ranks,
            migrate=self._migrate,
            time_budget_s=PLANNING_S,
            seed=iteration,
            policy=ReplanPolicy(),
            unpaid_us=unpaid_us,
        )
        try:
            self._beside.submit(trace, old, self._ports, self._cost, options)
        except (ScaleMoEError, OSError) as error:  # a full disk, no process to be had
            self._beside.close()
            self._failure = f"its planner could not be started: {error}"

    def is_due(self, iteration: int) -> bool:
        """Whether to look for an answer now: 1, 2, 4, 8, 16, 24, ... iterations after the question."""
        if self.asked_at is None:
            return False
        waited = iteration - self.asked_at
        return waited in (1, 2, 4) or (waited > 0 and waited % _LOOK_EVERY == 0)

    def wait(self) -> None:
        """Until there is an answer to take, or none will come."""
        if self._beside is not None:
            try:
                self._beside.wait(timeout_s=10 * PLANNING_S)
            except ScaleMoEError as error:
                self._failure = str(error)

    def take(self) -> Replan | None:
        """The answer, once; None while there is none. Raises `ScaleMoEError` on all ranks if the planner failed."""
        replan = self._poll()
        state = _FAILED if self._failure else _WAITING if replan is None else _READY
        shared = torch.tensor([state], device=torch.cuda.current_device())
        dist.broadcast(shared, group_src=0, group=self._stage)
        if int(shared) == _WAITING:
            return None
        self.asked_at = None
        answer = [replan, self._failure]
        self._failure = ""
        dist.broadcast_object_list(answer, group_src=0, group=self._stage)
        if int(shared) == _FAILED:
            raise ScaleMoEError(answer[1])
        return answer[0]

    def _poll(self) -> Replan | None:
        if self._beside is None or self._failure:
            return None
        try:
            return self._beside.poll()
        except (ScaleMoEError, OSError) as error:
            self._failure = str(error)
            return None

    def close(self) -> None:
        """End the planner's process."""
        if self._beside is not None:
            self._beside.close()
