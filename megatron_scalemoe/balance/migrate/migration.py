"""Move the homes of experts to where a new plan wants them, between two optimizer steps: all of them, or none.

Everything is first copied into buffers of its own, sent in rounds, and checked on arrival. Only when all ranks agree that it is whole does
each copy it into place. Until then nothing was changed, and the old plan stays in force if a rank objects.
"""

from __future__ import annotations

import dataclasses
import time
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
from megatron_scalemoe.plan.placement_plan import PlacementPlan

ExpertsOfLayers = Mapping[int, Experts]
ParametersOf = Callable[[Experts], tuple[Parameter, ...]]


@dataclasses.dataclass(frozen=True)
class MigrationReport:
    """What `migrate_homes` did on one pipeline stage; all but `seconds` is the same on all its ranks.

    reason: why nothing was changed, if not ok. num_moved: homes that changed rank. bytes_moved: sent between expert-parallel ranks, by all
    ranks together. seconds: on this rank.
    """

    ok: bool
    reason: str
    num_moved: int
    bytes_moved: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Staged:
    """Where the experts of one layer are put together that take a new slot on this rank: logical expert -> its slot and row of bytes."""

    state: ExpertState
    rows: Mapping[int, tuple[int, Tensor]]


def migrate_homes(
    experts: ExpertsOfLayers, parameters_of: ParametersOf, old: PlacementPlan, new: PlacementPlan, stage: dist.ProcessGroup
) -> MigrationReport:
    """Move weights and optimizer state of every expert whose home differs between the plans, and set the modules' `home_experts`.

    experts: the plan's layer -> module, on this pipeline stage. parameters_of: a module's weights with their optimizer state. stage: the
    ranks of the pipeline stage. Collective over them, after `optimizer.step()`. Only the home slots of the plans count: replicas have no
    state. Meanwhile a rank needs memory for the state of the experts that take a new slot on it, and of one more.

    Not ok, with state and homes as before on all ranks of this stage, if a rank cannot take part: too little memory, other plans than the
    other ranks, damaged data. Raises `ScaleMoEError` if a rank dies, and if in the end the homes are not those of the new plan.
    """
    started_s = time.perf_counter()
    if not experts:
        return MigrationReport(True, "", 0, 0, time.perf_counter() - started_s)
    some = next(iter(experts.values()))
    vote = Vote(stage, some.fc1.device, "migration")
    with torch.no_grad():
        moved, staged, outgoing_B = _prepare(experts, parameters_of, old, new, vote)
        reason = vote.refusal(_subject(staged, old, new))
        if not reason:
            bytes_moved = _transfer(experts, staged, outgoing_B, moved, vote)
            reason = vote.refusal()
        if reason:
            return MigrationReport(False, reason, 0, 0, time.perf_counter() - started_s)
        _commit(experts, staged)
    _check_homes(experts, new, vote)
    copies = vote.group.size() // some.ep_group.size()  # of each expert: parts by expert tensor parallelism, replicas by data parallelism
    return MigrationReport(True, "", moved.num_homes, copies * bytes_moved, time.perf_counter() - started_s)


def _prepare(
    experts: ExpertsOfLayers, parameters_of: ParametersOf, old: PlacementPlan, new: PlacementPlan, vote: Vote
) -> tuple[Moves | None, Mapping[int, _Staged] | None, Tensor | None]:
    """Homes that change rank on this stage, and the memory for it: arriving experts, and one that leaves. None where this rank objects."""
    vote.attempt(_check_plans, experts, old, new)
    found = vote.attempt(lambda: {layer: parameters_of(module) for layer, module in experts.items()})
    has_moments = any(parameter.adam for parameters in (found or {}).values() for parameter in parameters)
    with_moments = vote.anywhere(has_moments)
    moved = vote.attempt(_homes_that_move, old, new, list(experts))
    states = vote.attempt(lambda: {layer: expert_state.expert_state(found[layer], with_moments) for layer in experts})
    staged, outgoing_B = vote.attempt(_allocate, experts, states, new) or (None, None)
    return moved, staged, outgoing_B


def _subject(staged: Mapping[int, _Staged] | None, old: PlacementPlan, new: PlacementPlan) -> str:
    """What the ranks must agree on before they send each other experts."""
    kinds = sorted({layer_staged.state.description for layer_staged in (staged or {}).values()})
    return f"plans {old.content_hash[:12]} and {new.content_hash[:12]}, layers {list(staged or ())}, experts of {kinds}"


def _check_plans(experts: ExpertsOfLayers, old: PlacementPlan, new: PlacementPlan) -> None:
    for layer, module in experts.items():
        for plan in (old, new):
            found = (plan.num_ranks, plan.homes_per_rank)
            if layer >= plan.num_layers or found != (module.ep_group.size(), module.num_local_experts):
                problem = f"layer {layer}: the plan must be for {module.ep_group.size()} ranks with {module.num_local_experts} homes each"
                raise ScaleMoEError(problem, found=f"{plan.num_layers} layers, {found[0]} ranks with {found[1]} homes each")
        if module.home_experts != _homes(old, layer, module):
            problem = f"layer {layer}: the homes must be those of the old plan, experts {_homes(old, layer, module)}"
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


def _transfer(experts: ExpertsOfLayers, staged: Mapping[int, _Staged], outgoing_B: Tensor, moved: Moves, vote: Vote) -> int:
    """Fill all staged rows; how many bytes the expert-parallel group sent. A rank that objects goes through all of it, too."""
    for layer, module in experts.items():
        for expert, (_, row_B) in staged[layer].rows.items():
            if expert in module.home_experts:
                _pack(staged[layer].state, module.home_experts.index(expert), layer, expert, row_B, vote)
    ep_group, bytes_moved = next(iter(experts.values())).ep_group, 0
    for chosen in rounds(moved, ep_group.size()):
        layer = int(moved.layer[chosen[0]])
        row_bytes = staged[layer].state.layout.row_bytes
        _exchange_round(layer, experts[layer], staged[layer], outgoing_B[:row_bytes], _select(moved, chosen), vote)
        bytes_moved += row_bytes * len(chosen)
    return bytes_moved


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


def _check_homes(experts: ExpertsOfLayers, new: PlacementPlan, vote: Vote) -> None:
    """Raises on all ranks unless every logical expert has one home in each layer, where the plan wants it."""
    group = next(iter(experts.values())).ep_group
    homes_LH = torch.tensor([module.home_experts for module in experts.values()], device=vote.device)
    gathered = [torch.empty_like(homes_LH) for _ in range(group.size())]
    with naming_failure("migration: check of all homes", group):
        dist.all_gather(gathered, homes_LH, group=group)
    vote.attempt(_check_gathered_homes, list(experts), torch.cat(gathered, dim=1).cpu().numpy(), new)
    vote.settle(try_="restart from the last checkpoint: experts are lost")


def _check_gathered_homes(layers: list[int], homes_LE: np.ndarray, new: PlacementPlan) -> None:
    slots_LGS = new.physical_to_logical[layers].reshape(len(layers), new.num_ranks, -1)
    wanted_LE = slots_LGS[:, :, : new.homes_per_rank].reshape(len(layers), -1)
    for layer, homes_E, wanted_E in zip(layers, homes_LE, wanted_LE, strict=True):
        if not np.array_equal(homes_E, wanted_E):
            problem = f"layer {layer}: after the migration the home slots must hold experts {wanted_E.tolist()}"
            raise ScaleMoEError(problem, found=f"{homes_E.tolist()}")
