"""Move the homes of experts to where a new plan wants them, between two optimizer steps: all of them, or none.

Everything is first copied into buffers of its own, sent in rounds, and checked on arrival. Only when all ranks agree that it is whole does
each copy it into place. Until then nothing was changed, and the old plan stays in force if a rank objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.balance.migrate import state as expert_state
from megatron_scalemoe.balance.migrate.state import ExpertState, Parameter
from megatron_scalemoe.balance.model import Experts
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import Vote
from megatron_scalemoe.ops.payload import new_payload
from megatron_scalemoe.ops.ragged import naming_failure
from megatron_scalemoe.placement.migration import Moves, moves, rounds
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.plan.placement_plan import PlacementPlan

ExpertsOfLayers = Mapping[int, Experts]
ParametersOf = Callable[[Experts], tuple[Parameter, ...]]


@dataclasses.dataclass(frozen=True)
class _Staged:
    """Where the experts of one layer are put together that take a new slot on this rank: logical expert -> its slot and row of bytes."""

    state: ExpertState
    rows: Mapping[int, tuple[int, Tensor]]


def migrate_homes(
    experts: ExpertsOfLayers, parameters_of: ParametersOf, old: PlacementPlan, new: PlacementPlan, stage: dist.ProcessGroup
) -> str:
    """Move weights and optimizer state of every expert whose home differs between the plans, and set the modules' `home_experts`.

    experts: the plan's layer -> module, on this pipeline stage. parameters_of: a module's weights with their optimizer state. stage: the
    ranks of the pipeline stage. Collective over them, after `optimizer.step()`. Only the home slots of the plans count: replicas have no
    state. Meanwhile a rank needs memory for the state of the experts that take a new slot on it, and of one more.

    Returns "", or why a rank could not take part: too little memory, other plans than the other ranks, damaged data. Then state and homes
    are as before on all ranks of this stage. Raises `ScaleMoEError` if a rank dies, and if in the end the homes are not those of the new
    plan.
    """
    if not experts:
        return ""
    vote = Vote(stage, next(iter(experts.values())).fc1.device, "migration")
    with torch.no_grad():
        moved, staged, outgoing_B = _prepare(experts, parameters_of, old, new, vote)
        reason = vote.refusal(_subject(staged, old, new))
        if not reason:
            _transfer(experts, staged, outgoing_B, moved, vote)
            reason = vote.refusal()
        if reason:
            return reason
        _commit(experts, staged)
    vote.attempt(_check_homes, experts, new, "new")
    vote.settle(try_="restart from the last checkpoint: experts are lost")
    return ""


def _prepare(
    experts: ExpertsOfLayers, parameters_of: ParametersOf, old: PlacementPlan, new: PlacementPlan, vote: Vote
) -> tuple[Moves | None, Mapping[int, _Staged] | None, Tensor | None]:
    """Homes that change rank on this stage, and the memory for it: arriving experts, and one that leaves. None where this rank objects."""
    vote.attempt(_check_plans, experts, old, new)
    found = vote.attempt(lambda: {layer: parameters_of(module) for layer, module in experts.items()})
    with_moments = vote.anywhere(any(parameter.adam for parameters in (found or {}).values() for parameter in parameters))
    moved = vote.attempt(_homes_that_move, old, new, list(experts))
    states = vote.attempt(lambda: {layer: expert_state.expert_state(found[layer], with_moments) for layer in experts})
    staged, outgoing_B = vote.attempt(_allocate, experts, states, new) or (None, None)
    return moved, staged, outgoing_B


def _subject(staged: Mapping[int, _Staged] | None, old: PlacementPlan, new: PlacementPlan) -> str:
    """What the ranks must agree on before they send each other experts."""
    kinds = sorted({layer_staged.state.description for layer_staged in (staged or {}).values()})
    return f"plans {old.content_hash[:12]} and {new.content_hash[:12]}, layers {list(staged or ())}, experts of {kinds}"


def _check_plans(experts: ExpertsOfLayers, old: PlacementPlan, new: PlacementPlan) -> None:
    module = next(iter(experts.values()))
    ranks, homes = module.ep_group.size(), module.num_local_experts
    check_fit({"the model": Sizes(None, ranks, ranks * homes), "the old plan": old, "the new plan": new})
    _check_homes(experts, old, "old")


def _check_homes(experts: ExpertsOfLayers, plan: PlacementPlan, which: str) -> None:
    """Raises unless the experts that this rank holds are those of the plan. If no rank objects, each expert has one home."""
    for layer, module in experts.items():
        if module.home_experts != _homes(plan, layer, module):
            problem = f"layer {layer}: the homes must be those of the {which} plan, experts {_homes(plan, layer, module)}"
            raise ScaleMoEError(problem, found=f"experts {module.home_experts}")


def _homes(plan: PlacementPlan, layer: int, module: Experts) -> tuple[int, ...]:
    """The logical experts that have their homes in a module's slots."""
    slots_GS = plan.physical_to_logical[layer].reshape(plan.num_ranks, -1)
    return tuple(slots_GS[module.ep_group.rank(), : plan.homes_per_rank].tolist())


def _homes_that_move(old: PlacementPlan, new: PlacementPlan, layers: list[int]) -> Moves:
    found = moves(old, new)
    return _select(found, np.flatnonzero(found.is_home & np.isin(found.layer, layers)))


def _select(moved: Moves, chosen: np.ndarray) -> Moves:
    """The moves at these positions."""
    return Moves(*(getattr(moved, field.name)[chosen] for field in dataclasses.fields(Moves)))


def _allocate(experts: ExpertsOfLayers, states: Mapping[int, ExpertState], new: PlacementPlan) -> tuple[Mapping[int, _Staged], Tensor]:
    staged = {}
    for layer, module in experts.items():
        homes = _homes(new, layer, module)
        changed = [slot for slot, expert in enumerate(homes) if expert != module.home_experts[slot]]
        rows_NB, _ = new_payload(len(changed), states[layer].layout, module.fc1.device)
        rows = {homes[slot]: (slot, row_B) for slot, row_B in zip(changed, rows_NB, strict=True)}
        staged[layer] = _Staged(states[layer], rows)
    largest = max((state.layout for state in states.values()), key=lambda layout: layout.row_bytes)
    return staged, new_payload(1, largest, module.fc1.device)[0][0]


def _transfer(experts: ExpertsOfLayers, staged: Mapping[int, _Staged], outgoing_B: Tensor, moved: Moves, vote: Vote) -> None:
    """Fill all staged rows. A rank that objects goes through all of it, too."""
    for layer, module in experts.items():
        for expert, (_, row_B) in staged[layer].rows.items():
            if expert in module.home_experts:
                _pack(staged[layer].state, module.home_experts.index(expert), layer, expert, row_B, vote)
    for chosen in rounds(moved, next(iter(experts.values())).ep_group.size()):
        layer = int(moved.layer[chosen[0]])
        outgoing = outgoing_B[: staged[layer].state.layout.row_bytes]
        _exchange_round(layer, experts[layer], staged[layer], outgoing, _select(moved, chosen), vote)


def _exchange_round(layer: int, module: Experts, staged: _Staged, outgoing_B: Tensor, moved: Moves, vote: Vote) -> None:
    """One round of `rounds`: this rank sends at most one expert and receives at most one."""
    rank, ranks = module.ep_group.rank(), range(module.ep_group.size())
    leaving, arriving = moved.expert[moved.source == rank].tolist(), moved.expert[moved.destination == rank].tolist()
    for expert in leaving:
        _pack(staged.state, module.home_experts.index(expert), layer, expert, outgoing_B, vote)
    to, source = moved.destination[moved.source == rank].tolist(), moved.source[moved.destination == rank].tolist()
    incoming_B = staged.rows[arriving[0]][1] if arriving else outgoing_B[:0]
    input_splits, output_splits = ([row.numel() * (i in peers) for i in ranks] for row, peers in ((outgoing_B, to), (incoming_B, source)))
    _send(outgoing_B[: sum(input_splits)], incoming_B, input_splits, output_splits, module.ep_group)
    for expert in arriving:
        vote.attempt(expert_state.check_seal, incoming_B, layer, expert)


def _send(outgoing_B: Tensor, incoming_B: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup) -> None:
    with naming_failure("migration: exchange of experts", group):
        dist.all_to_all_single(incoming_B, outgoing_B, output_splits, input_splits, group=group)


def _pack(state: ExpertState, slot: int, layer: int, expert: int, row_B: Tensor, vote: Vote) -> None:
    """Write all state of the expert in `slot` into a row. Collective over the ranks between which the optimizer cuts it, if it does."""
    expert_state.unseal(row_B)
    for tensor, row_N in state.columns(row_B):
        for owner, start, end in tensor.pieces(slot):
            piece_N = row_N[start:end]
            if tensor.group is None or tensor.group.rank() == owner:
                vote.attempt(tensor.read, slot, start, end, piece_N)
            if tensor.group is not None and tensor.group.size() > 1:
                with naming_failure("migration: gathering optimizer state", tensor.group):
                    source = dist.get_global_rank(tensor.group, owner)
                    dist.broadcast(piece_N.view(torch.uint8), source, group=tensor.group)
    vote.attempt(expert_state.seal, row_B, layer, expert)


def _commit(experts: ExpertsOfLayers, staged: Mapping[int, _Staged]) -> None:
    """Copies on this rank only, into memory that exists."""
    for layer, module in experts.items():
        homes = list(module.home_experts)
        for slot, row_B in staged[layer].rows.values():
            for tensor, row_N in staged[layer].state.columns(row_B):
                tensor.write(slot, row_N)
            homes[slot] = expert_state.sealed_expert(row_B)
        module.home_experts = tuple(homes)
