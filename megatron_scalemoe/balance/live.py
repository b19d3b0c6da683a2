"""Live balance: replicas and homes of experts that follow the routing while the model trains.

Counts accumulate on the device. Every `--scalemoe-replan-interval` iterations they come to one rank of the pipeline stage, whose planner
works in a process of its own while training goes on (the overlap of the paper's superbatches). When it is done all ranks get the new plan
at the same step boundary, check that they have the same one, move homes if it says so, and dispatch by it from the next step on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.balance import plans as live_plans
from megatron_scalemoe.balance.calibrate import group_ports, measured_cost
from megatron_scalemoe.balance.figures.live import StepFigures
from megatron_scalemoe.balance.figures.log import event_text
from megatron_scalemoe.balance.layers import live_layers, return_gradients_before_reduction, send_replicas_ahead, watch_passes
from megatron_scalemoe.balance.migrate.migration import migrate_homes
from megatron_scalemoe.balance.node_order import check_node_order
from megatron_scalemoe.balance.recorder import RoutingRecorder, joined, whole_trace
from megatron_scalemoe.balance.sequences.live_sequences import LiveSequences
from megatron_scalemoe.config import DEFAULT_REPLAN_INTERVAL, ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.expert_state import check_migration_support
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from megatron_scalemoe.placement.replan.policy import ReplanPolicy
from megatron_scalemoe.placement.replan.replan import Replan, ReplanOptions
from megatron_scalemoe.plan.placement_plan import PlacementPlan, format_plan
from megatron_scalemoe.traffic.trace import RoutingTrace, save_trace
from megatron_scalemoe.version import SCHEMA_VERSION

# Of the planner, for all layers of a stage.
PLANNING_S = 2.0
_TRACE_FILE, _MOST_RECORDED = "routing.npz", 1000
PLAN_FILE, STATISTICS_FILE, _EVENTS_KEPT = "scalemoe_plan.json", "scalemoe_statistics.json", 20
_WAITING, _FAILED, _READY = range(3)


class LiveBalance:
    """Owns the plan of this pipeline stage, the planner's process and the record of the routing.

    All ranks make it after the model and its optimizer, before the first step; call `step_done` after every optimizer step and `close` at
    the end. `say` gets the log lines, on the first rank of the stage. layers: of this rank. layer_numbers: Megatron's numbers, from 1, of
    all MoE layers of the model, the rows of its plans. events: what was said, as dictionaries for a JSON file.
    sequences: with `--scalemoe-sequence-placement`, what the data loader has to ask.
    """

    def __init__(
        self,
        model_chunks: list[torch.nn.Module],
        optimizer,
        config: TransformerConfig,
        scalemoe: ScaleMoEConfig,
        *,
        micro_batches: int,
        micro_batch_size: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self._optimizer, self._scalemoe, self._micro_batches, self._say = optimizer, scalemoe, micro_batches, say
        self.layers, self.layer_numbers = live_layers(model_chunks)
        self._stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._leads = self._stage.rank() == 0
        self._num_rows = len(self.layer_numbers)
        self._ranks_and_experts = config.expert_model_parallel_size, config.num_moe_experts
        self._planner: BackgroundPlanner | None = None
        self._asked = 0
        self._iteration: int | None = None
        self._unpaid_us = self._saving_us = 0.0
        self._recorded: RoutingTrace | None = None
        self.events: list[dict] = []
        self.plan: PlacementPlan | None = None
        ranks, experts = self._ranks_and_experts
        self._recorder = RoutingRecorder(
            [live.layer.router for live in self.layers],
            micro_batches,
            {"topk": config.moe_router_topk, "hidden_size": config.hidden_size, "ffn_hidden_size": config.moe_ffn_hidden_size},
        )
        self._figures = StepFigures(self.layers)
        self._places = scalemoe.places_experts and ranks > 1
        observes = scalemoe.trace_path or scalemoe.sequence_placement != "none"
        self._interval = scalemoe.replans_every or (DEFAULT_REPLAN_INTERVAL if observes else 0)
        if self._places and self.layers:
            whole = live_plans.start_plan(scalemoe, self._num_rows, ranks, experts)
            self._make_placeable(model_chunks, config, whole)
            spare = whole.slots_per_rank - whole.homes_per_rank
            self.plan = PlacementPlan.contiguous(len(self.layers), ranks, experts, replica_slots_per_rank=spare)
            self.adopt(live_plans.stage_plan(whole, self._rows))
        self.sequences: LiveSequences | None = None
        if scalemoe.sequence_placement != "none":
            options = {"by_history": scalemoe.sequence_placement == "history", "micro_batches": micro_batches}
            options["micro_batch_size"] = micro_batch_size
            self.sequences = LiveSequences(model_chunks, self.layers, config, self._whole_plan(), **options)
        self._pass_begun = False
        watch_passes(model_chunks[0], optimizer, self._begin_pass, self._stepped)

    @property
    def _rows(self) -> list[int]:
        return [live.row for live in self.layers]

    def _make_placeable(self, model_chunks: list[torch.nn.Module], config: TransformerConfig, start: PlacementPlan) -> None:
        check_migration_support(self._optimizer)
        return_gradients_before_reduction(model_chunks, self.layers)
        if not model_chunks[0].ddp_config.overlap_param_gather:  # there the next layer's parameters may not have come yet
            send_replicas_ahead(self.layers)
        self._ports = group_ports(self._scalemoe.topology)
        of_topology = self._ports.node_of_rank.tolist() if self._scalemoe.topology else None
        check_node_order(start.provenance.get("node_of_rank"), of_topology)
        self._cost = measured_cost(config, self.layers[0].experts, self._micro_batches)
        if self._leads and self._scalemoe.replans_every:
            self._planner = BackgroundPlanner()

    def adopt(self, plan: PlacementPlan) -> bool:
        """Put this stage's plan in force, moving homes and their optimizer state where they change. Collective; between optimizer steps.

        False, and nothing has changed on any rank, if a move failed its checks; the reason was said.
        """
        live_plans.check_same_plan(plan)
        experts = {live.index: live.experts for live in self.layers}
        report = migrate_homes(experts, self._optimizer, self.plan, plan)
        if not report.ok:
            self._tell({"event": "migration failed", "reason": report.reason})
            return False
        self.plan = plan
        for live in self.layers:
            live.apply(plan, self._ports.node_of_rank)
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

    def step_done(self, iteration: int) -> None:
        """Call on every rank after every optimizer step, with the number of the iteration that it ended. Numbers may be left out."""
        began = time.perf_counter()
        before = iteration - 1 if self._iteration is None else self._iteration
        self._iteration = iteration
        self._figures.end_step()
        self._recorder.end_step()
        if self._interval and _is_due(self._scalemoe.trace_interval, before, iteration):
            self._recorder.mark(iteration)
        if self._asked and _is_power_of_two(iteration - self._asked):
            self._take_plan(iteration)
        if self._interval and _is_due(self._interval, before, iteration):
            self._end_interval(iteration)
        if self.sequences is not None:
            self.sequences.start_step(iteration + 1)
        self._figures.add_exposed(time.perf_counter() - began)

    def replan_now(self, iteration: int) -> None:
        """Ask for a plan from the counts recorded so far, wait for it and put it in force. Collective; for tests and impatient users."""
        self._recorder.mark(iteration)
        self._end_interval(iteration)
        if self._leads:
            self._planner.wait(timeout_s=10 * PLANNING_S)
        self._take_plan(iteration)

    def checkpoint_files(self) -> dict[str, str]:
        """Names and contents of the files that belong beside a checkpoint: the plan, and figures of the run. Collective.

        None are needed to load the checkpoint: its expert tensors are in logical order.
        """
        statistics = {"schema_version": SCHEMA_VERSION, "unpaid_us": self._unpaid_us, "events": self.events[-_EVENTS_KEPT:]}
        files = {STATISTICS_FILE: json.dumps(statistics, indent=1)}
        if self._places:
            files[PLAN_FILE] = format_plan(self._whole_plan())
        return files

    def resume(self, checkpoint: Path) -> None:
        """Call after loading this checkpoint: goes on with the plan that was in force when it was saved, if it fits. Collective."""
        self._iteration = None
        self._renew_replicas()
        if not self._places:
            return
        plan, problem = live_plans.plan_beside(checkpoint / PLAN_FILE, self._num_rows, self._ranks_and_experts, self._scalemoe.replicas)
        if plan is None:
            self._tell({"event": "plan not resumed", "reason": problem} if problem else {"event": "no plan to resume"})
        elif self.plan is not None:
            self.adopt(live_plans.stage_plan(plan, self._rows))

    def close(self) -> None:
        """End the planner's process and write what was recorded."""
        if self._scalemoe.trace_path:
            self._save_trace(self._recorder.gather())
        if self._planner is not None:
            self._planner.close()

    def _whole_plan(self) -> PlacementPlan:
        """Of all pipeline stages. Collective over pipeline ranks."""
        if not self._places:
            return PlacementPlan.contiguous(self._num_rows, *self._ranks_and_experts)
        return live_plans.whole_plan(self.plan, self._rows, self._num_rows)

    def _end_interval(self, iteration: int) -> None:
        """Tell how the last interval went, and ask for the next plan."""
        of_sequences = self.sequences.update(self._whole_plan()) if self.sequences is not None else {}
        if self.layers:
            event = self._figures.gather(iteration) | of_sequences
            self._tell(event)
            self._unpaid_us = max(0.0, self._unpaid_us - event["steps"] * self._saving_us)
        trace = self._recorder.gather()
        self._save_trace(trace)
        if trace is None or self.plan is None or not self._scalemoe.replans_every or self._asked:
            return
        self._asked = iteration
        if self._leads:
            slots = (self.plan.slots_per_rank - self.plan.homes_per_rank) * self.plan.num_ranks
            options = ReplanOptions(
                replicas=slots,
                migrate=self._scalemoe.migrate,
                time_budget_s=PLANNING_S,
                seed=iteration,
                policy=ReplanPolicy(),
                unpaid_us=self._unpaid_us,
            )
            self._planner.submit(trace, self.plan, self._ports, self._cost, options)

    def _take_plan(self, iteration: int) -> None:
        """Put the plan in force that the planner has made, if it has."""
        replan, state, why = None, _WAITING, ""
        if self._leads:
            try:
                replan = self._planner.poll()
                state = _WAITING if replan is None else _READY
            except ScaleMoEError as error:
                state, why = _FAILED, str(error)
        shared = torch.tensor([state], device=torch.cuda.current_device())
        dist.broadcast(shared, group_src=0, group=self._stage)
        state = int(shared)
        if state == _WAITING:
            return
        self._asked = 0
        if state == _FAILED:
            self._tell({"event": "planner failed", "iteration": iteration, "reason": why})
            return
        found = [replan]
        dist.broadcast_object_list(found, group_src=0, group=self._stage)
        self._follow(iteration, found[0])

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
        event |= {name: getattr(replan, name) for name in names}
        self._tell(event)
        # stages of a pipeline take their plans at different times: then it waits for the end of the interval
        if self.sequences is not None and parallel_state.get_pipeline_model_parallel_world_size() == 1:
            self.sequences.follow(self._whole_plan())

    def _save_trace(self, trace: RoutingTrace | None) -> None:
        """Add to the file of recorded steps, if there is to be one. Collective over pipeline ranks."""
        if not self._scalemoe.trace_path:
            return
        whole = whole_trace(trace, self._rows, self._num_rows)
        if whole is None:
            return
        self._recorded = joined(self._recorded, whole, _MOST_RECORDED)
        if dist.get_rank() == 0:
            Path(self._scalemoe.trace_path).mkdir(parents=True, exist_ok=True)
            save_trace(self._recorded, Path(self._scalemoe.trace_path) / _TRACE_FILE, force=True)

    def _tell(self, event: dict) -> None:
        self.events.append(event)
        if self._leads:
            self._say(event_text(event))


def _is_due(interval: int, before: int, now: int) -> bool:
    """Whether a multiple of `interval` lies in (before, now]: Megatron can skip the very iteration."""
    return now // interval > before // interval


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
