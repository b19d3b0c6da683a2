"""Training under plans that change, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

import contextlib
from unittest import mock

from tests.integration.tiny_gpt import Setup, Training  # first: it installs the CPU ranks

# isort: split
import numpy as np

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.integration import migration, replicas
from megatron_scalemoe.integration.live import LiveBalance
from megatron_scalemoe.plan import PlacementPlan


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


def make_live(setup: Setup, replicas_in_all: int) -> tuple[Training, LiveBalance]:
    """A training whose plan only the test changes."""
    config = ScaleMoEConfig(replicas=replicas_in_all, replan_interval=0, migrate=True)
    training = Training(setup.with_options(scalemoe=config))
    live = LiveBalance([training.model], training.optimizer, training.config, config, micro_batches=setup.micro_batches, say=lambda _: None)
    return training, live


def live_losses(setup: Setup, steps: int, replicas_in_all: int, replan_every: int, migrate_every: int, planted: str = "") -> list[float]:
    """Losses with random new replicas, and random new homes, every so many steps. planted: a mistake to make."""
    with _planted(planted):
        training, live = make_live(setup, replicas_in_all)
        rng = np.random.default_rng(setup.seed)
        losses = []
        for step in range(1, steps + 1):
            losses += training.losses(1)
            live.step_done(step)
            moves = step % migrate_every == 0
            if moves or step % replan_every == 0:
                assert live.adopt(random_plan(live.plan, rng, permute=moves)), live.events
    return losses


def stock_losses(setup: Setup, steps: int) -> list[float]:
    return Training(setup).losses(steps)


@contextlib.contextmanager
def _planted(mistake: str):
    if mistake == "replica gradient not summed":
        with mock.patch.object(replicas, "sum_rows", lambda x, rows: x.new_zeros(rows.num_rows, x.shape[1])):
            yield
    elif mistake == "moment not moved":
        ...
    else:
        assert not mistake
        yield
