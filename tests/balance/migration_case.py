"""What the ranks of test_migration.py do. Imported by pool workers only."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.mcore.tiny_gpt import Setup, Training  # first: it installs the CPU ranks

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_scalemoe.balance.migrate import migration
from megatron_scalemoe.balance.migrate import state as state_rows
from megatron_scalemoe.balance.migrate.migration import migrate_homes
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.checkpoint import save_checkpoint
from megatron_scalemoe.mcore.checkpoint.optimizer import optimizer_parts
from megatron_scalemoe.mcore.layers import expert_state
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP
from megatron_scalemoe.mcore.live_model import megatron_groups
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from tests.mcore.checkpoint.checkpoint_case import stored_differences

State = dict[tuple, torch.Tensor]  # (layer, logical expert, expert-tensor-parallel rank, parameter, tensor) -> flat values


class ReplicasDiffer(AssertionError):
    """Two ranks have different values of the same weights."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, its experts by layer of the plan, and the plan in force."""

    model: torch.nn.Module
    optimizer: Any
    experts: dict[int, ScaleMoEGroupedMLP]
    plan: PlacementPlan

    def migrate(self, new: PlacementPlan) -> str:
        """Why the homes have not moved; "" if they have."""
        return self.migrate_from(self.plan, new)

    def migrate_from(self, old: PlacementPlan, new: PlacementPlan) -> str:
        def parameters_of(module):
            return expert_state.find_parameters(module, self.optimizer)

        return migrate_homes(self.experts, parameters_of, old, new, megatron_groups().stage)


def trained_run(steps: int = 2, **options) -> Run:
    """A tiny GPT of 2 layers after some steps."""
    training = Training(Setup(scalemoe_experts="grouped", **options))
    training.losses(steps)
    return _run(training)


def _run(training: Training) -> Run:
    model = training.model
    experts = {module.layer_number - 1: module.experts for module in model.modules() if isinstance(module, MoELayer)}
    assert all(isinstance(module, ScaleMoEGroupedMLP) for module in experts.values())
    one = next(iter(experts.values()))
    plan = PlacementPlan.contiguous(2, one.ep_group.size(), one.ep_group.size() * one.num_local_experts)
    return Run(model, training.optimizer, experts, plan)


def shuffled(plan: PlacementPlan, seed: int, within_ranks: bool = False) -> PlacementPlan:
    """Homes in random slots: of any rank, or of the rank that has them."""
    generator = np.random.default_rng(seed)
    slots_LGS = plan.physical_to_logical.reshape(plan.num_layers, plan.num_ranks, -1)
    slots = generator.permuted(slots_LGS, axis=2) if within_ranks else generator.permuted(plan.physical_to_logical, axis=1)
    return PlacementPlan(slots.reshape(plan.num_layers, -1), plan.num_ranks, plan.num_logical_experts)


def state_of(run: Run, whole_weights: bool = True) -> State:
    """Every tensor of every expert, put together from all ranks with Megatron's own bookkeeping; replicas must be equal.

    whole_weights: False where Megatron has not gathered the distributed optimizer's weights yet; then each rank's own share counts.
    """
    mine = {}
    for layer, module in run.experts.items():
        shard = (layer, module.tp_group.rank(), module.ep_group.rank())
        for name in ("fc1", "fc2"):
            pieces = _pieces(run.optimizer, getattr(module, name), whole_weights)
            mine.update({(*shard, name, kind, module.home_experts): piece for kind, piece in pieces.items()})
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    shapes = {"fc1": next(iter(run.experts.values())).fc1.shape, "fc2": next(iter(run.experts.values())).fc2.shape}
    flat: dict[tuple, torch.Tensor] = {}
    for part in gathered:
        for key, (start, values) in part.items():
            whole = flat.setdefault(key, torch.full((shapes[key[3]].numel(),), float("nan"), dtype=values.dtype))
            known = whole[start : start + len(values)]
            if not bool((known.isnan() | (known == values)).all()):
                raise ReplicasDiffer(key)
            known.copy_(values)
    state = {}
    for (layer, tp_rank, _, name, kind, homes), whole in flat.items():
        assert not whole.isnan().any(), "a part is nowhere"
        for expert, row in zip(homes, whole.view(len(homes), -1), strict=True):
            assert state.setdefault((layer, expert, tp_rank, name, kind), row) is row, "an expert has two homes"
    return state


def _pieces(optimizer: Any, weight: torch.nn.Parameter, whole_weights: bool) -> dict[str, tuple[int, torch.Tensor]]:
    """Tensor -> the offset and values of what this rank has of it."""
    flat_weight = weight.detach().view(-1)
    part = next((part for part in optimizer_parts(optimizer) if _has(part, weight)), None)
    if part is None:  # a share of the distributed optimizer with nothing of this weight
        return {"weight": (0, flat_weight.clone())} if whole_weights else {}
    if isinstance(part, DistributedOptimizer):
        found, own = part._get_main_param_and_optimizer_states(weight), part._get_model_param_range_map(weight)["param"]
        start, end = own.start, own.end
    else:
        main = getattr(weight, "main_param", weight)
        found, start, end = {"param": main, **part.optimizer.state.get(main, {})}, 0, len(flat_weight)
    pieces = {kind: (start, value.detach().reshape(-1).clone()) for kind, value in found.items() if kind != "step"}
    pieces["weight"] = (0, flat_weight.clone()) if whole_weights else (start, flat_weight[start:end].clone())
    return pieces


def _has(part: Any, weight: torch.nn.Parameter) -> bool:
    if isinstance(part, DistributedOptimizer):
        return weight in part.model_param_gbuf_map
    main = getattr(weight, "main_param", weight)
    return any(main is other for group in part.optimizer.param_groups for other in group["params"])


def _cuts_an_expert(optimizer: Any, weight: torch.nn.Parameter) -> bool:
    """Whether the distributed optimizer's share of this rank begins inside an expert."""
    parts = [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer) and _has(part, weight)]
    return any(part._get_model_param_range_map(weight)["param"].start % weight[0].numel() for part in parts)


def differences(one: State, other: State) -> list[str]:
    """Entries that are not bitwise equal in both."""
    keys = sorted(one.keys() | other.keys())
    return [str(key) for key in keys if key not in one or key not in other or not _same_bits(one[key], other[key])]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def migrate(options: dict, seed: int, *, within_ranks: bool = False, gathered: bool = True) -> dict:
    """Migrates there and back; what a test wants to know of it."""
    run = trained_run(**options)
    before = state_of(run, whole_weights=gathered)
    new = shuffled(run.plan, seed, within_ranks)
    reason = run.migrate(new)
    after = state_of(run)
    homes = {layer: module.home_experts for layer, module in run.experts.items()}
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    wanted = {layer: tuple(new.physical_to_logical[layer].reshape(new.num_ranks, -1)[ep_rank].tolist()) for layer in run.experts}
    back = dataclasses.replace(run, plan=new).migrate(run.plan)
    return dict(
        reason=reason,
        back=back,
        homes_fit=homes == wanted,
        tensors=sorted({kind for *_, kind in before}),
        experts=len({key[:3] for key in before}),
        different=differences(before, after),
        different_back=differences(before, state_of(run)),
        distinct=len({values.sum().item() for values in before.values()}) / len(before),
        cut=any(_cuts_an_expert(run.optimizer, weight) for module in run.experts.values() for weight in (module.fc1, module.fc2)),
        moves=int((run.plan.home_rank != new.home_rank)[list(run.experts)].sum()),
    )


def losses_after_a_round_trip(options: dict) -> tuple[list[float], list[float], bool]:
    """Losses of an uninterrupted run, and of one whose experts migrated and came back; whether a rank had old weights at that time."""
    want = Training(Setup(scalemoe_experts="grouped", **options)).losses(4)
    training = Training(Setup(scalemoe_experts="grouped", **options))
    got = training.losses(2)
    run = _run(training)
    old_weights = _has_old_weights(run)
    new = shuffled(run.plan, 5)
    assert run.migrate(new) == dataclasses.replace(run, plan=new).migrate(run.plan) == ""
    return want, got + training.losses(2), old_weights


def _has_old_weights(run: Run) -> bool:
    try:
        state_of(run)
    except ReplicasDiffer:
        return True
    return False


def checkpoint_differences(directory: Path, options: dict) -> list[str]:
    """What differs between the checkpoints before and after a migration: experts are stored by their logical number."""
    run = trained_run(**options)
    first = save_checkpoint(directory / "first", 2, [run.model], run.optimizer)
    assert run.migrate(shuffled(run.plan, 6)) == ""
    return stored_differences(first, save_checkpoint(directory / "second", 2, [run.model], run.optimizer))


@contextlib.contextmanager
def planted(module: Any, name: str, fault: Callable, rank: int) -> Iterator[None]:
    """`module.name` is `fault(original)` on this rank."""
    original = getattr(module, name)
    if dist.get_rank() == rank:
        setattr(module, name, fault(original))
    try:
        yield
    finally:
        setattr(module, name, original)


def _corrupting(send: Callable) -> Callable:
    def send_and_flip_a_bit(outgoing_B, incoming_B, *rest):
        send(outgoing_B, incoming_B, *rest)
        if incoming_B.numel():
            incoming_B[-100] ^= 4

    return send_and_flip_a_bit


def _swapping_values(send: Callable) -> Callable:
    def send_and_swap_words(outgoing_B, incoming_B, *rest):
        send(outgoing_B, incoming_B, *rest)
        if incoming_B.numel():
            words = incoming_B.view(torch.int32)
            words[20:22] = words[20:22].flip(0)

    return send_and_swap_words


def _mislabelling(seal: Callable) -> Callable:
    return lambda row_B, layer, expert: seal(row_B, layer, expert + 1)


def _failing(allocate: Callable) -> Callable:
    def fail(*_):
        raise MemoryError("planted")

    return fail


FAULTS = {
    "no memory": (migration, "_allocate", _failing),
    "changed bit": (migration, "_send", _corrupting),
    "swapped values": (migration, "_send", _swapping_values),
    "other expert": (state_rows, "seal", _mislabelling),
    "cannot pack": (state_rows, "seal", _failing),
    "unknown parameter": (expert_state, "find_parameters", _failing),
}


def refused(options: dict, faults: list[str], rank: int) -> dict:
    """What happens with each fault planted on one rank, and in the attempt after them."""
    run = trained_run(**options)
    before, new, reasons = state_of(run), shuffled(run.plan, 3), []
    homes = [module.home_experts for module in run.experts.values()]
    for fault in faults:
        with planted(*FAULTS[fault], rank=rank):
            reasons.append(run.migrate(new))
    homes_kept = homes == [module.home_experts for module in run.experts.values()]
    different = differences(before, state_of(run))
    again = run.migrate(new)
    return dict(
        reasons=reasons, homes_kept=homes_kept, different=different, again=again, different_again=differences(before, state_of(run))
    )


def other_plans() -> list[str]:
    """Refusals where a rank has another new plan, another old plan, and where the plan is for another number of ranks."""
    run = trained_run(ep=2)
    before, rank = state_of(run), dist.get_rank()
    reasons = [run.migrate(shuffled(run.plan, seed=rank))]
    other_old = shuffled(run.plan, 1) if rank else run.plan
    reasons.append(run.migrate_from(other_old, shuffled(run.plan, 2)))
    reasons.append(run.migrate(PlacementPlan.contiguous(2, 4, 8)))
    assert differences(before, state_of(run)) == []
    return reasons


def lost_expert() -> str:
    """What is said if a commit leaves an expert without a home."""
    run = trained_run(ep=2)

    def forgetting(commit: Callable) -> Callable:
        def forget(*args):
            commit(*args)
            run.experts[1].home_experts = (run.experts[1].home_experts[0],) * 4

        return forget

    with planted(migration, "_commit", forgetting, rank=1):
        try:
            run.migrate(shuffled(run.plan, 3))
        except ScaleMoEError as error:
            return str(error)
    raise AssertionError("nothing was said")
