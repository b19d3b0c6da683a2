"""One rank of the kill campaign: the example's training, with homes that move all the time and a kill at a chosen moment.

torchrun ... -- tools/kill_hooks.py '{"rank": 1, "moment": "experts in flight", "occurrence": 2, "delay_s": 0.5, "marker": "FILE"}' FLAGS...

The kill is SIGKILL from the rank to itself, so nothing of it runs afterwards. Before, it writes the time of day to `marker`.
"""

import dataclasses
import functools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_scalemoe.mcore import cpu_ranks
from megatron_scalemoe.placement.migration import moves
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from megatron_scalemoe.placement.replan.replan import Replan
from megatron_scalemoe.plan.placement_plan import PlacementPlan

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "gpt_moe"
# Of the replans: those that wait for the real planner's answer before they put a random plan in its place.
_WAIT_SHARE, _PLANNING_S, _LONGEST_WAIT_S = 0.2, 0.2, 60.0


def random_plan(old: PlacementPlan, rng: np.random.Generator) -> PlacementPlan:
    """Random homes, and random replicas in all slots that `old` has for them."""
    layers = []
    for _ in range(old.num_layers):
        homes_GL = rng.permutation(old.num_logical_experts).reshape(old.num_ranks, -1)
        others = [np.setdiff1d(np.arange(old.num_logical_experts), homes) for homes in homes_GL]
        copies_GC = np.stack([rng.choice(free, old.slots_per_rank - old.homes_per_rank, replace=False) for free in others])
        layers.append(np.concatenate([homes_GL, copies_GC], axis=1).reshape(-1))
    return PlacementPlan(np.stack(layers), old.num_ranks, old.num_logical_experts)


class RandomPlanner(BackgroundPlanner):
    """Starts the real planner's process, but answers with a random plan: the policy rarely moves homes in a tiny run."""

    def submit(self, trace, old, ports, cost, options) -> None:
        self._old, self._options = old, options
        super().submit(trace, old, ports, cost, options)

    def poll(self):
        if not self.busy:
            return None
        rng = np.random.default_rng([self._options.seed, 1])
        if rng.random() < _WAIT_SHARE:
            self.wait(_LONGEST_WAIT_S)
            figures = dataclasses.asdict(super().poll())
        else:
            self.close()
            figures = {}
        return _replan(self._old, random_plan(self._old, rng), figures)


def _replan(old: PlacementPlan, new: PlacementPlan, figures: dict):
    figures = {name: figures.get(name, 0.0) for name in (field.name for field in dataclasses.fields(Replan))}
    changes = moves(old, new)
    counts = {"moved_homes": changes.num_homes, "replicas_added": int((~changes.is_home).sum()), "replicas_removed": 0}
    return Replan(**{**figures, **counts, "plan": new, "changed": True, "reason": "a random plan of the kill campaign"})


class Killer:
    """Counts how often this rank comes to a moment, and ends it there, or `delay_s` later in moments that last."""

    def __init__(self, occurrence: int, delay_s: float, marker: Path):
        self._left, self._delay_s, self._marker = occurrence, delay_s, marker

    def comes(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.kill()

    def comes_to_a_span(self) -> None:
        self._left -= 1
        if self._left == 0:
            threading.Timer(self._delay_s, self.kill).start()

    def kill(self) -> None:
        self._marker.write_text(json.dumps({"time_s": time.time()}))
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, action: Callable[[], None]) -> None:
    """Let `action` come before each call of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments, **named):
        action()
        return original(*arguments, **named)

    setattr(owner, name, wrapper)


def after(owner, name: str, action: Callable[[], None]) -> None:
    """Let `action` come after each call of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments, **named):
        result = original(*arguments, **named)
        action()
        return result

    setattr(owner, name, wrapper)


def _commit_first_layer(migration, killer: Killer) -> None:
    original = migration._commit

    def commit(experts, staged):
        first = next(iter(experts))
        original({first: experts[first]}, staged)
        killer.comes()
        original({layer: module for layer, module in experts.items() if layer != first}, staged)

    migration._commit = commit


def _after_rename(checkpoint_files, killer: Killer) -> None:
    """The checkpoint has its name, the tracker still that of the one before."""
    original = checkpoint_files._sync

    def sync(path: Path) -> None:
        original(path)
        if path.name == f".{checkpoint_files.TRACKER}":
            killer.comes()

    checkpoint_files._sync = sync


def install(moment: str, killer: Killer) -> None:
    """Aim `killer` at one of `kill_checks.MOMENTS`."""
    from megatron_scalemoe.balance import live, replicas
    from megatron_scalemoe.balance.migrate import migration
    from megatron_scalemoe.mcore.checkpoint import checkpoint
    from megatron_scalemoe.mcore.checkpoint import directory as checkpoint_files

    balance, serialization = live.LiveBalance, checkpoint.serialization
    hooks = {
        "after the optimizer step": (before, balance, "step_done"),
        "replica parameters leave": (before, replicas.LayerReplicas, "start"),
        "replica gradients return": (before, replicas.LayerReplicas, "return_gradients"),
        "counts gathered": (before, balance, "_end_interval"),
        "planner at work": (after, balance, "_end_interval"),
        "plan taken": (before, balance, "_take_plan"),
        "plan known": (before, balance, "_follow"),
        "migration starts": (before, migration, "_prepare"),
        "memory allocated": (after, migration, "_prepare"),
        "experts in flight": (before, migration, "_exchange_round"),
        "experts arrived": (after, migration, "_transfer"),
        "all layers committed": (after, migration, "_commit"),
        "new plan in force": (after, balance, "adopt"),
        "checkpoint starts": (before, serialization, "save"),
        "checkpoint written": (after, serialization, "save"),
        "checkpoint published": (after, checkpoint, "publish"),
        "checkpoint read": (before, serialization, "load"),
        "plan resumed": (before, balance, "resume"),
    }
    if moment in hooks:
        place, owner, name = hooks[moment]
        place(owner, name, killer.comes)
    elif moment == "first layer committed":
        _commit_first_layer(migration, killer)
    elif moment == "renamed, not yet the latest":
        _after_rename(checkpoint_files, killer)
    elif moment == "checkpoint being written":
        before(serialization, "save", killer.comes_to_a_span)
    else:
        raise AssertionError(f"unknown moment {moment}")


def main() -> None:
    job = json.loads(sys.argv[1])
    cpu_ranks.install()
    from megatron_scalemoe.balance import planner

    planner.BackgroundPlanner, planner.PLANNING_S = RandomPlanner, _PLANNING_S
    if job["moment"] and job["rank"] == int(os.environ["RANK"]):
        install(job["moment"], Killer(job["occurrence"], job["delay_s"], Path(job["marker"])))
    sys.argv = [str(EXAMPLE / "pretrain_gpt.py"), *sys.argv[2:]]
    sys.path.insert(0, str(EXAMPLE))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":  # Megatron's checkpoint writer may import this file again
    main()
