"""The plans of a live run: the one to start with, this pipeline stage's part of it, and all stages' parts together again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import Vote
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan, load_plan


def start_plan(scalemoe: ScaleMoEConfig, num_layers: int, num_ranks: int, num_experts: int) -> PlacementPlan:
    """The plan of the whole model that a run starts with: `--scalemoe-plan`, or Megatron's own placement, with the slots for replicas.

    Raises `ScaleMoEError` if the file is for another model or other expert-parallel ranks, or has more replica slots than allowed.
    """
    if scalemoe.plan is None:
        return PlacementPlan.contiguous(num_layers, num_ranks, num_experts, replica_slots_per_rank=(scalemoe.replicas or 0) // num_ranks)
    plan = load_plan(Path(scalemoe.plan))
    _check_fits_model(plan, f"--scalemoe-plan {scalemoe.plan}", Sizes(num_layers, num_ranks, num_experts))
    if scalemoe.replicas is None:
        return plan
    return with_replica_slots(plan, scalemoe.replicas // num_ranks)


def _check_fits_model(plan: PlacementPlan, source: str, model: Sizes) -> None:
    """Raises `ScaleMoEError` unless the plan is for the model's MoE layers, expert-parallel ranks and experts."""
    check_fit({"the model (its MoE layers, expert-parallel ranks)": model, source: plan}, try_="scalemoe plan with a trace of this model")


def with_replica_slots(plan: PlacementPlan, per_rank: int) -> PlacementPlan:
    """The same plan with so many replica slots on each rank. Raises `ScaleMoEError` if its replicas do not fit."""
    slots_LGS = plan.physical_to_logical.reshape(plan.num_layers, plan.num_ranks, -1)
    homes, replicas = slots_LGS[:, :, : plan.homes_per_rank], slots_LGS[:, :, plan.homes_per_rank :]
    in_use = np.take_along_axis(replicas, np.argsort(replicas == EMPTY, axis=2, kind="stable"), 2)
    if (in_use[:, :, per_rank:] != EMPTY).any():
        found = f"{int((replicas != EMPTY).sum(axis=2).max())} on a rank"
        raise ScaleMoEError(
            f"the plan must not have more than {per_rank} replicas on a rank", found=found, try_="a larger --scalemoe-replicas"
        )
    padding = np.full((*homes.shape[:2], max(0, per_rank - in_use.shape[2])), EMPTY)
    slots = np.concatenate([homes, in_use[:, :, :per_rank], padding], axis=2)
    return PlacementPlan(slots.reshape(plan.num_layers, -1), plan.num_ranks, plan.num_logical_experts, plan.provenance)


def stage_plan(plan: PlacementPlan, rows: Sequence[int]) -> PlacementPlan:
    """The part of a whole model's plan for the MoE layers in these rows."""
    return PlacementPlan(plan.physical_to_logical[list(rows)], plan.num_ranks, plan.num_logical_experts, plan.provenance)


def whole_plan(part: PlacementPlan | None, rows: Sequence[int], num_layers: int, pipeline: dist.ProcessGroup) -> PlacementPlan:
    """The plan of all pipeline stages from each one's part (None for a stage without MoE layers). Collective over pipeline ranks."""
    parts: list = [None] * pipeline.size()
    mine = part and (list(rows), part.physical_to_logical, part.num_ranks, part.num_logical_experts)
    dist.all_gather_object(parts, mine, group=pipeline)
    parts = [found for found in parts if found is not None]
    slots = np.full((num_layers, parts[0][1].shape[1]), EMPTY)
    for some_rows, some_slots, _, _ in parts:
        slots[some_rows] = some_slots
    return PlacementPlan(slots, parts[0][2], parts[0][3])


def plan_beside(path: Path, num_layers: int, ranks_and_experts: tuple[int, int], replicas: int | None) -> tuple[PlacementPlan | None, str]:
    """The plan saved with a checkpoint, or None and the reason why it cannot be used: "" where none was saved, as by stock Megatron.

    Rank 0 reads. Collective over all ranks.
    """
    found: list = [None, ""]
    if dist.get_rank() == 0 and path.exists():
        try:
            plan = load_plan(path)
            _check_fits_model(plan, str(path), Sizes(num_layers, *ranks_and_experts))
            found[0] = plan if replicas is None else with_replica_slots(plan, replicas // plan.num_ranks)
        except ScaleMoEError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    return found[0], found[1]


def check_same_plan(plan: PlacementPlan, stage: dist.ProcessGroup) -> None:
    """Raises `ScaleMoEError` on every rank of the pipeline stage unless all have the same plan. Collective."""
    Vote(stage, torch.cuda.current_device(), "check of plans").settle(f"the plan {plan.content_hash[:15]}")
