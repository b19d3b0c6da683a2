"""Training under plans that change, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from tests.mcore.tiny_gpt import GLOBAL_BATCH, Setup, Training  # first: it installs the CPU ranks

# isort: split
import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_scalemoe.balance import planner, replicas
from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megatron_scalemoe.mcore.live_model import live_balance
from megatron_scalemoe.plan.placement_plan import PlacementPlan


def random_plan(old: PlacementPlan, rng: np.random.Generator, *, permute: bool) -> PlacementPlan:
    """Random replicas in all slots that `old` has for them, and, with `permute`, random homes."""
    homes_per_rank, replicas_per_rank = old.homes_per_rank, old.slots_per_rank - old.homes_per_rank
    layers = []
    for slots_GS in old.physical_to_logical.reshape(old.num_layers, old.num_ranks, -1):
        homes_GL = slots_GS[:, :homes_per_rank]
        if permute:
            homes_GL = rng.permutation(old.num_logical_experts).reshape(homes_GL.shape)
        others = [np.setdiff1d(np.arange(old.num_logical_experts), homes) for homes in homes_GL]
        copies_GC = np.stack([rng.choice(free, replicas_per_rank, replace=False) for free in others])
        layers.append(np.concatenate([homes_GL, copies_GC], axis=1).reshape(-1))
    return PlacementPlan(np.stack(layers), old.num_ranks, old.num_logical_experts)


def make_live(setup: Setup, config: ScaleMoEConfig) -> tuple[Training, LiveBalance]:
    training = Training(setup.with_options(scalemoe=config, dispatcher="alltoall"))
    samples = GLOBAL_BATCH // parallel_state.get_data_parallel_world_size() // setup.micro_batches
    sizes = {"micro_batches": setup.micro_batches, "micro_batch_size": samples}
    live = live_balance([training.model], training.optimizer, training.config, config, **sizes, say=lambda _: None)
    if live.sequences is not None:
        training.placement = live.sequences
    return training, live


def random_losses(setup: Setup, steps: int, replicas_in_all: int, *, place: str = "none", transport: str = "shm") -> list[float]:
    """Losses with random new replicas every 5 steps, and every 10 random new homes. place: sequences by what."""
    options = {"replan_interval": 0, "migrate": True, "sequence_placement": place, "trace_interval": 1, "transport": transport}
    training, live = make_live(setup, ScaleMoEConfig(replicas=replicas_in_all, **options))
    rng = np.random.default_rng(setup.seed)
    losses, moved_sequences = [], 0
    for step in range(1, steps + 1):
        losses += training.losses(1)
        live.step_done(step)
        if step % 5 == 0:
            assert live.adopt(random_plan(live.plan, rng, permute=step % 10 == 0)), live.events
            if live.sequences is not None:
                moved_sequences += live.sequences.update(live._whole_plan()).get("moved_sequences", 0)
    assert live.sequences is None or moved_sequences > 0
    live.close()
    return losses


def planned_run(setup: Setup, steps: int, every: int) -> dict:
    """Losses, events and final plan of a run that the real planner balances, waiting for each plan."""
    config = ScaleMoEConfig(replicas=4, migrate=True, trace_interval=1, replan_interval=10 * steps)
    training, live = make_live(setup, config)
    losses = []
    for step in range(1, steps + 1):
        losses += training.losses(1)
        live.step_done(step)
        if step % every == 0:
            with mock.patch.object(planner, "PLANNING_S", 1.0):
                live.replan_now(step)
    plan_hash, events = live.plan.content_hash, list(live.events)
    live.close()
    return {"losses": losses, "events": events, "hash": plan_hash}


def run_with_a_dead_planner(setup: Setup) -> dict:
    """What happens when the planner's process is killed."""
    config = ScaleMoEConfig(replicas=4, trace_interval=1, replan_interval=4)
    training, live = make_live(setup, config)
    before = live.plan.content_hash
    losses = []
    for step in range(1, 7):
        losses += training.losses(1)
        live.step_done(step)
        if step == 4 and live._planner._beside is not None:
            live._planner._beside._process.kill()
            live._planner._beside._process.wait()
    events, after = list(live.events), live.plan.content_hash
    live.close()
    return {"losses": losses, "events": events, "unchanged": before == after}


def repeated_steps(setup: Setup, steps: int, *, repeat: bool, place: str = "none") -> dict:
    """Trains with replicas. repeat: all micro-batches of every second step are computed twice, as Megatron does where it doubts a result.

    Returns losses, what was counted, how often replicas' parameters were sent.
    """
    options = {"replan_interval": 0, "trace_interval": 1, "sequence_placement": place}
    training, live = make_live(setup, ScaleMoEConfig(replicas=4, **options))
    live.adopt(random_plan(live.plan, np.random.default_rng(0), permute=False))
    step_optimizer, sent, losses = training.optimizer.step, [], []
    send = replicas.LayerReplicas._exchange

    def exchange(self, rows, splits, *, async_op):
        sent.extend([1] * async_op)
        return send(self, rows, splits, async_op=async_op)

    with mock.patch.object(replicas.LayerReplicas, "_exchange", exchange):
        for step in range(1, steps + 1):
            if repeat and step % 2 == 0:
                scheduled, begun = training.scheduler.step, training.step
                training.optimizer.step = training.scheduler.step = lambda *_: None
                training.losses(1)
                training.optimizer.step, training.scheduler.step, training.step = step_optimizer, scheduled, begun
            losses += training.losses(1)
            live.step_done(step)
    dispatchers = [live_layer.layer.token_dispatcher for live_layer in live.layers]
    counted = {
        "routed": [live_layer.layer.router.tokens_per_expert.tolist() for live_layer in live.layers],
        "computed": [int(dispatcher.rows_computed) for dispatcher in dispatchers],
        "selections": [dispatcher.selections for dispatcher in dispatchers],
    }
    learnt = live.sequences._learner._counts_RLE.sum().item() if live.sequences is not None else None
    live.close()
    return {"losses": losses, "counted": counted, "sent": len(sent), "learnt": learnt}


def iterations_left_out(setup: Setup) -> list[int]:
    """Iterations of the replans and recorded steps of a run in which Megatron skipped those that were due."""
    training, live = make_live(setup, ScaleMoEConfig(replicas=4, trace_interval=2, replan_interval=4))
    for step in (1, 2, 3, 5, 6, 7, 9):
        training.losses(1)
        live.step_done(step)
    events = [event["iteration"] for event in live.events if event["event"] == "interval"]
    live.close()
    return events


def impatient_replans(setup: Setup) -> list[str]:
    """What `replan_now` leads to: without a planner, before the first step, right after an interval."""
    said = []
    for interval, steps in ((0, 1), (2, 0), (2, 2)):
        training, live = make_live(setup, ScaleMoEConfig(replicas=4, trace_interval=1, replan_interval=interval))
        for step in range(1, steps + 1):
            training.losses(1)
            live.step_done(step)
        try:
            live.replan_now(steps)
            said.append(live.events[-1]["event"] if live.events else "nothing")
        except ScaleMoEError as error:
            said.append(error.problem)
        live.close()
    return said


def plans_that_differ(setup: Setup) -> str:
    _, live = make_live(setup, ScaleMoEConfig(replicas=4, replan_interval=0))
    plan = random_plan(live.plan, np.random.default_rng(dist.get_rank()), permute=False)
    try:
        live.adopt(plan)
    except ScaleMoEError as error:
        return str(error)
    return ""


def save_live(setup: Setup, directory: Path) -> tuple[list[float], str]:
    """Trains with moved homes and replicas, saves in between; the losses after that, and the hash of the plan in force."""
    training, live = make_live(setup, ScaleMoEConfig(replicas=4, migrate=True, replan_interval=0))
    training.losses(2)
    live.step_done(2)
    assert live.adopt(random_plan(live.plan, np.random.default_rng(3), permute=True))
    for step in (3, 4):
        training.losses(1)
        live.step_done(step)
    files = live.checkpoint_files()
    save_checkpoint(directory, training.step, [training.model], training.optimizer, training.scheduler, files=files)
    losses = []
    for step in range(5, 9):
        losses += training.losses(1)
        live.step_done(step)
    return losses, live.plan.content_hash


def resume_live(setup: Setup, directory: Path) -> tuple[list[float], str, list[dict]]:
    training, live = make_live(setup.with_options(seed=9), ScaleMoEConfig(replicas=4, migrate=True, replan_interval=0))
    live.adopt(random_plan(live.plan, np.random.default_rng(5), permute=True))  # the files must not depend on the plan of the reader
    loaded = load_checkpoint(directory, [training.model], training.optimizer, training.scheduler)
    live.resume(loaded.path)
    training.step, losses = loaded.iteration, []
    for step in range(5, 9):
        losses += training.losses(1)
        live.step_done(step)
    return losses, live.plan.content_hash, list(live.events)


def resume_stock(setup: Setup, directory: Path) -> list[float]:
    training = Training(setup.with_options(seed=9))
    loaded = load_checkpoint(directory, [training.model], training.optimizer, training.scheduler)
    training.step = loaded.iteration
    return training.losses(4)


def stock_losses(setup: Setup, steps: int) -> list[float]:
    return Training(setup).losses(steps)
