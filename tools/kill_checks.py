"""What the kill campaign draws and checks: pure functions, and readers of logs and checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import load_plan

ANYWHERE = "anywhere"
# How often each comes, at least, in the first 25 iterations of a restarted run: the kill is at one of these.
MOMENTS = {
    ANYWHERE: 20,
    "after the optimizer step": 20,
    "replica parameters leave": 40,
    "replica gradients return": 40,
    "counts gathered": 4,
    "planner at work": 4,
    "plan taken": 4,
    "plan known": 4,
    "migration starts": 4,
    "memory allocated": 4,
    "experts in flight": 20,
    "experts arrived": 4,
    "first layer committed": 4,
    "all layers committed": 4,
    "new plan in force": 4,
    "checkpoint starts": 2,
    "checkpoint being written": 2,
    "checkpoint written": 2,
    "renamed, not yet the latest": 2,
    "checkpoint published": 2,
    "checkpoint read": 1,
    "plan resumed": 1,
}
_ON_RANK_0 = {"renamed, not yet the latest", "checkpoint published"}
_NEED_CHECKPOINT = {"checkpoint read", "plan resumed"}
_ANYWHERE_SHARE, _LONGEST_DELAY_S = 0.3, 0.3
_EXPERT_WEIGHTS = re.compile(r"mlp\.experts\.experts\.linear_fc[12]\.weight$")


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL for `rank` at the given occurrence of a moment; `delay_s` later if that lasts, and after so many iterations if anywhere."""

    rank: int
    moment: str
    occurrence: int
    delay_s: float


def choose_kills(count: int, ranks: int, seed: int) -> list[Kill]:
    """The campaign's kills in random order: three in ten anywhere, the others at all moments in turn."""
    draw = random.Random(seed)
    moments = [moment for moment in MOMENTS if moment != ANYWHERE]
    draw.shuffle(moments)
    num_anywhere = round(count * _ANYWHERE_SHARE)
    chosen = list(itertools.islice(itertools.cycle(moments), count - num_anywhere)) + [ANYWHERE] * num_anywhere
    draw.shuffle(chosen)
    kills = []
    for moment in chosen:
        rank = 0 if moment in _ON_RANK_0 else draw.randrange(ranks)
        kills.append(Kill(rank, moment, draw.randint(1, MOMENTS[moment]), draw.uniform(0, _LONGEST_DELAY_S)))
    return kills


def take_kill(kills: list[Kill], resumes: bool) -> Kill:
    """Removes and returns the first kill that can come: without a checkpoint to resume from, some cannot."""
    possible = (i for i, kill in enumerate(kills) if resumes or kill.moment not in _NEED_CHECKPOINT)
    return kills.pop(next(possible, 0))


@dataclasses.dataclass(frozen=True)
class Log:
    """What rank 0 printed: the losses by iteration, the iteration of the checkpoint that it loaded, and how many homes it moved."""

    losses: Mapping[int, float]
    loaded: int | None
    moved_homes: int


def read_log(text: str) -> Log:
    losses = {int(i): float(loss) for i, loss in re.findall(r" iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|", text)}
    loaded = re.search(r" loaded checkpoint from .* at iteration (\d+)", text)
    moved = sum(int(number) for number in re.findall(r"(\d+) homes? moved", text))
    return Log(losses, int(loaded[1]) if loaded else None, moved)


def survivor_faults(errors: Mapping[int, str], victim: int) -> list[str]:
    """Every rank but the victim must have said, once, who died: by the roll call, or by the transport. errors: rank -> its stderr."""
    wanted = f"rank {victim} died"
    counts = {rank: text.count(wanted) for rank, text in errors.items() if rank != victim}
    return [f"rank {rank} says {count} times that {wanted}" for rank, count in sorted(counts.items()) if count != 1]


def resume_faults(log: Log, tracker: int | None) -> list[str]:
    """A restart must go on from the iteration that the tracker named, without a gap, unless it was killed while loading."""
    if log.loaded is None and not log.losses:
        return []
    faults = [] if log.loaded == tracker else [f"loaded the checkpoint of {log.loaded}, but the tracker named {tracker}"]
    wanted = list(range((tracker or 0) + 1, (tracker or 0) + 1 + len(log.losses)))
    if sorted(log.losses) != wanted:
        faults.append(f"iterations {sorted(log.losses)[:3]}... after the checkpoint of {tracker}")
    return faults


def tracker_faults(before: int | None, now: int | None, log: Log, interval: int) -> list[str]:
    """The tracker must name the last checkpoint that was complete: iteration i + 1 starts only when i is saved."""
    last = max(log.losses, default=before or 0)
    least = max(before or 0, (last - 1) // interval * interval)
    if not least <= (now or 0) <= last:
        return [f"the tracker names {now} after iteration {last}; at least {least} was saved"]
    return []


def loss_faults(losses: Mapping[int, float], reference: Mapping[int, float], tolerance: float) -> list[str]:
    far = [(i, loss, reference[i]) for i, loss in sorted(losses.items()) if not abs(loss - reference[i]) <= tolerance]
    return [f"loss {loss:.6f} at iteration {i}, reference {wanted:.6f} ({len(far)} such)" for i, loss, wanted in far[:1]]


def tiling_faults(key: str, shape: Sequence[int], chunks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
    """The chunks (offsets, sizes) of a tensor [layers, experts, ...] must hold every element once."""
    times = np.zeros(tuple(shape), dtype=np.int32)
    for offsets, sizes in chunks:
        times[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] += 1
    wrong = np.argwhere((times != 1).reshape(*times.shape[:2], -1).any(axis=2))
    return [f"{key}: layer {layer} expert {expert} is not stored exactly once" for layer, expert in wrong[:1].tolist()]


def duplicate_faults(key: str, weights_LEN: np.ndarray) -> list[str]:
    """No two experts of a layer may have the same weights."""
    counts = [len(np.unique(experts_EN, axis=0)) for experts_EN in weights_LEN]
    return [f"{key}: layer {layer} has {n} different experts" for layer, n in enumerate(counts) if n != weights_LEN.shape[1]]


def distance_faults(key: str, weights_LEN: np.ndarray, reference_LEN: np.ndarray, tolerance: float) -> list[str]:
    """Every expert must be the reference run's expert of the same number, up to `tolerance` of the reference's largest value."""
    distance_LE = np.abs(weights_LEN - reference_LEN).max(axis=2) / np.abs(reference_LEN).max()
    wrong = np.argwhere(~(distance_LE <= tolerance)).tolist()
    return [f"{key}: layer {layer} expert {expert} is {distance_LE[layer, expert]:.2g} from the reference" for layer, expert in wrong[:1]]


def read_expert_weights(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Expert weights [L, E, N] and moments of a torch_dist checkpoint, by key, and what is wrong with how they are stored."""
    import torch
    from torch.distributed import checkpoint

    metadata = checkpoint.FileSystemReader(path).read_metadata()
    tensors, faults = {}, []
    for key, entry in metadata.state_dict_metadata.items():
        if _EXPERT_WEIGHTS.search(key):
            faults += tiling_faults(key, entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
            tensors[key] = torch.empty(entry.size)
    with warnings.catch_warnings():  # that nothing is distributed here
        warnings.simplefilter("ignore")
        checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(path), no_dist=True)
    return {key: tensor.flatten(2).numpy() for key, tensor in tensors.items()}, faults


def checkpoint_faults(path: Path, reference: Path, experts: tuple[int, int], tolerance: float) -> list[str]:
    """experts: layers and experts of a layer."""
    try:
        plan = load_plan(path / "scalemoe_plan.json")
        faults = [] if (plan.num_layers, plan.num_logical_experts) == experts else ["scalemoe_plan.json is for another model"]
    except ScaleMoEError as error:
        faults = [str(error)]
    weights, found = read_expert_weights(path)
    wanted, _ = read_expert_weights(reference)
    faults += found
    if weights.keys() != wanted.keys() or len(wanted) != 6:  # 2 weights, each with 2 moments
        return [*faults, f"expert tensors {sorted(weights)}, reference {sorted(wanted)}"]
    for key, values_LEN in weights.items():
        if values_LEN.shape[:2] != experts:
            faults.append(f"{key} is of {values_LEN.shape[:2]} experts")
            continue
        if not key.startswith("optimizer."):  # moments of experts without tokens are all 0
            faults += duplicate_faults(key, values_LEN)
        faults += distance_faults(key, values_LEN, wanted[key], tolerance)
    return faults
