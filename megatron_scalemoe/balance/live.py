"""Live balance: replicas and homes of experts that follow the routing while the model trains.

Counts accumulate on the device. Every `--scalemoe-replan-interval` iterations they come to one rank of the pipeline stage, whose planner
works in a process of its own while training goes on (the overlap of the paper's superbatches). When it is done all ranks get the new plan
at the same step boundary, check that they have the same one, move homes if it says so, and dispatch by it from the next step on.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from pathlib import Path

from megatron_scalemoe.balance import plans
from megatron_scalemoe.balance.calibrate import group_ports, measured_cost
from megatron_scalemoe.balance.metrics import StepMeter
from megatron_scalemoe.balance.migrate.migration import migrate_homes
from megatron_scalemoe.balance.model import LiveModel
from megatron_scalemoe.balance.node_order import check_node_order
from megatron_scalemoe.balance.planner import StagePlanner
from megatron_scalemoe.balance.recorder import RoutingRecorder, TraceFile, joined
from megatron_scalemoe.balance.sequences.learned_placement import LearnedPlacement
from megatron_scalemoe.balance.writers import event_text
from megatron_scalemoe.config import DEFAULT_REPLAN_INTERVAL, ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.replan.replan import Replan
from megatron_scalemoe.plan.placement_plan import PlacementPlan, format_plan
from megatron_scalemoe.traffic.trace import RoutingTrace

PLAN_FILE = "scalemoe_plan.json"
_MOST_EVENTS = 1000


class LiveBalance:
    """Owns the plan of this pipeline stage, the planner's process and the record of the routing. `mcore.live_model.live_balance` makes it.

    All ranks make it after the model and its optimizer, before the first step; call `step_done` after every optimizer step and `close` at
    the end. `say` gets the log lines, on the first rank of the stage. model: with the layers of this rank. steps: done so far. events: the
    latest that were said, of `num_events`, as dictionaries for a JSON file. sequences: with `--scalemoe-sequence-placement`, what the data
    loader has to ask.
    """

    def __init__(
        self,
        model: LiveModel,
        scalemoe: ScaleMoEConfig,
        *,
        micro_batches: int,
        micro_batch_size: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.model, self._scalemoe, self._micro_batches, self._say = model, scalemoe, micro_batches, say
        self.layers, self._groups = model.layers, model.groups
        self.steps = self.num_events = 0
        self.events: collections.deque[dict] = collections.deque(maxlen=_MOST_EVENTS)
        self.plan: PlacementPlan | None = None
        self._planner: StagePlanner | None = None
        self._iteration: int | None = None
        self._unpaid_us = self._saving_us = 0.0
        self._rows = [live.row for live in self.layers]
        self._recorder = RoutingRecorder([live.layer.router for live in self.layers], self._groups, model.sizes)
        self._unplanned: RoutingTrace | None = None  # recorded while the planner works on an earlier trace
        self._trace_file: TraceFile | None = None
        if scalemoe.trace_path:
            self._trace_file = TraceFile(scalemoe.trace_path, self._rows, self._num_rows, self._groups)
        self._meter = StepMeter(self.layers, self._groups)
        observes = scalemoe.trace_path or scalemoe.sequence_placement != "none"
        self._interval = scalemoe.replans_every or (DEFAULT_REPLAN_INTERVAL if observes else 0)
        self._places = scalemoe.places_experts and self._groups.ep.size() > 1
        if self._places and self.layers:
            self._start_placing()
        self.sequences: LearnedPlacement | None = None
        if scalemoe.sequence_placement != "none":
            options = {"by_history": scalemoe.sequence_placement == "history", "micro_batches": micro_batches}
            self.sequences = LearnedPlacement(model, self._whole_plan(), **options, micro_batch_size=micro_batch_size)
        self._pass_begun = False
        model.watch_passes(self._begin_pass, self._stepped)

    @property
    def _num_rows(self) -> int:
        return len(self.model.layer_numbers)

    def _start_placing(self) -> None:
        """Measure what the planner must know, and put the first plan in force."""
        scalemoe, groups = self._scalemoe, self._groups
        whole = plans.start_plan(scalemoe, self._num_rows, groups.ep.size(), self.model.sizes.num_experts)
        self.model.prepare_for_plans()
        ports = group_ports(scalemoe.topology, groups)
        self._node_of_rank_G = ports.node_of_rank
        check_node_order(whole.provenance.get("node_of_rank"), ports.node_of_rank.tolist() if scalemoe.topology else None, groups)
        cost = measured_cost(self.model.sizes, self.layers[0].experts, self._micro_batches, groups.stage)
        if scalemoe.replans_every:
            self._planner = StagePlanner(groups.stage, ports, cost, migrate=scalemoe.migrate)
        spare = whole.slots_per_rank - whole.homes_per_rank
        self.plan = PlacementPlan.contiguous(len(self.layers), whole.num_ranks, whole.num_logical_experts, replica_slots_per_rank=spare)
        self.adopt(plans.stage_plan(whole, self._rows))

    def adopt(self, plan: PlacementPlan) -> bool:
        """Put this stage's plan in force, moving homes and their optimizer state where they change. Collective; between optimizer steps.

        False, and nothing has changed on any rank, if a move failed its checks; the reason was said.
        """
        plans.check_same_plan(plan, self._groups.stage)
        experts = {live.index: live.experts for live in self.layers}
        reason = migrate_homes(experts, self.model.parameters_of, self.plan, plan, self._groups.stage)
        if reason:
            self._tell({"event": "migration failed", "reason": reason})
            return False
        self.plan = plan
        for live in self.layers:
            live.apply(plan, self._node_of_rank_G)
        return True

    def _begin_pass(self) -> None:
        """The gradients are 0: all micro-batches of a step come now, or come again if there was no optimizer step since the last time."""
        for live in self.layers:
            live.layer.count_tokens(not self._pass_begun)
            if live.replicas is not None:
                live.replicas.drop_gradients()
        if self._pass_begun and self.sequences is not None:
            self.sequences.skip_pass()
        self._pass_begun = True

    def _stepped(self) -> None:
        """The optimizer has changed the parameters."""
        self._pass_begun = False
        self._renew_replicas()

    def _renew_replicas(self) -> None:
        for live in self.layers:
            if live.replicas is not None:
                live.replicas.renew()

    def step_done(self, iteration: int, micro_batches: int | None = None) -> None:
        """Call on every rank after every optimizer step, with the number of the iteration that it ended. Numbers may be left out.
        micro_batches: of this step, if not as many as at the start."""
        began = time.perf_counter()
        before = iteration - 1 if self._iteration is None else self._iteration
        self._iteration = iteration
        self.steps += 1
        self._meter.end_step()
        self._recorder.end_step(micro_batches or self._micro_batches)
        if self._interval and _is_due(self._scalemoe.trace_interval, before, iteration):
            self._recorder.mark(iteration)
        if self._planner is not None and self._planner.is_due(iteration):
            self._take_plan(iteration)
        if self._interval and _is_due(self._interval, before, iteration):
            self._end_interval(iteration)
        if self.sequences is not None:
            self.sequences.start_step(iteration + 1)
        self._meter.add_exposed(time.perf_counter() - began)

    def replan_now(self, iteration: int) -> None:
        """Ask for a plan from the counts recorded so far, wait for it and put it in force; nothing happens where none were. Collective; for
        tests and impatient users. Raises `ScaleMoEError` without a planner."""
        if self.layers and self._planner is None:
            raise ScaleMoEError("replan_now needs a planner", found="no replans", try_="--scalemoe-replan-interval")
        self._recorder.mark(iteration)
        self._end_interval(iteration)
        if self._planner is not None and self._planner.busy:
            self._planner.wait()
            self._take_plan(iteration)

    def checkpoint_files(self) -> dict[str, str]:
        """Names and contents of the files that belong beside a checkpoint: the plan, if experts are placed. Collective.

        None are needed to load the checkpoint: its expert tensors are in logical order.
        """
        return {PLAN_FILE: format_plan(self._whole_plan())} if self._places else {}

    def events_since(self, number: int) -> list[dict]:
        """Those that were said after the first `number`, as far as they are kept."""
        new = min(self.num_events - number, len(self.events))
        return list(self.events)[len(self.events) - new :]

    def resume(self, checkpoint: Path) -> None:
        """Call after loading this checkpoint: goes on with the plan that was in force when it was saved, if it fits. Collective."""
        self._iteration = None
        self._renew_replicas()
        if not self._places:
            return
        ranks_and_experts = self._groups.ep.size(), self.model.sizes.num_experts
        plan, problem = plans.plan_beside(checkpoint / PLAN_FILE, self._num_rows, ranks_and_experts, self._scalemoe.replicas)
        if plan is None:
            self._tell({"event": "plan not resumed", "reason": problem} if problem else {"event": "no plan to resume"})
        elif self.plan is not None:
            self.adopt(plans.stage_plan(plan, self._rows))

    def close(self) -> None:
        """End the planner's process and write what was recorded."""
        if self._planner is not None:
            self._planner.close()
        if self._trace_file is not None:
            self._add_to_file(self._recorder.gather())

    def _whole_plan(self) -> PlacementPlan:
        """Of all pipeline stages. Collective over pipeline ranks."""
        if not self._places:
            return PlacementPlan.contiguous(self._num_rows, self._groups.ep.size(), self.model.sizes.num_experts)
        return plans.whole_plan(self.plan, self._rows, self._num_rows, self._groups.pp)

    def _end_interval(self, iteration: int) -> None:
        """Tell how the last interval went, and ask for the next plan."""
        of_sequences = self.sequences.update(self._whole_plan()) if self.sequences is not None else {}
        if self.layers and self._meter.steps:
            event = self._meter.gather(iteration) | of_sequences
            self._tell(event)
            self._unpaid_us = max(0.0, self._unpaid_us - event["steps"] * self._saving_us)
        trace = self._recorder.gather()
        if self._trace_file is not None:
            self._add_to_file(trace)
        if trace is None or self._planner is None:
            return
        trace = joined(self._unplanned, trace)
        if self._planner.busy:
            self._unplanned = trace
            self._tell_of_waiting(iteration)
        else:
            self._unplanned = None
            self._planner.ask(iteration, trace, self.plan, self._unpaid_us)

    def _tell_of_waiting(self, iteration: int) -> None:
        """After 2, 4, 8, ... intervals: the planner may have been stopped."""
        intervals = (iteration - self._planner.asked_at) // self._interval
        if intervals >= 2 and intervals & (intervals - 1) == 0:
            self._tell({"event": "planner busy", "iteration": iteration, "asked_at": self._planner.asked_at})

    def _add_to_file(self, trace: RoutingTrace | None) -> None:
        if problem := self._trace_file.add(trace):
            self._tell({"event": "trace not written", "reason": problem})

    def _take_plan(self, iteration: int) -> None:
        """Put the plan in force that the planner has made, if it has."""
        try:
            replan = self._planner.take()
        except ScaleMoEError as error:
            self._tell({"event": "planner failed", "iteration": iteration, "reason": str(error)})
            return
        if replan is not None:
            self._follow(iteration, replan)

    def _follow(self, iteration: int, replan: Replan) -> None:
        began = time.perf_counter()
        done = not replan.changed or self.adopt(replan.plan)
        took_s = time.perf_counter() - began
        if not done:
            return
        if replan.moved_homes:
            self._unpaid_us += took_s * 1e6
            self._saving_us = replan.current_us - replan.planned_us
        event = {"event": "replan", "iteration": iteration, "took_s": took_s, "reason": replan.reason}
        names = ("moved_homes", "replicas_added", "replicas_removed", "current_us", "planned_us")
        names += ("max_over_mean_before", "max_over_mean_after", "replica_us", "migration_us", "changed")
        self._tell(event | {name: getattr(replan, name) for name in names})
        # stages of a pipeline take their plans at different times: then it waits for the end of the interval
        if self.sequences is not None and self._groups.pp.size() == 1:
            self.sequences.follow(self._whole_plan())

    def _tell(self, event: dict) -> None:
        self.events.append(event)
        self.num_events += 1
        if self._groups.stage.rank() == 0:
            self._say(event_text(event))


def _is_due(interval: int, before: int, now: int) -> bool:
    """Whether a multiple of `interval` lies in (before, now]: Megatron can skip the very iteration."""
    return now // interval > before // interval
