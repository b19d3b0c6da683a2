"""Training under plans that change, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

from tests.integration.tiny_gpt import Setup, Training  # first: it installs the CPU ranks

# isort: split
import numpy as np
from megatron.core import parallel_state

from megatron_scalemoe.integration.live_layers import live_layers, return_gradients_before_reduction, send_replicas_ahead
from megatron_scalemoe.plan import PlacementPlan


def random_plan(rng: np.random.Generator, layers: int, ranks: int, experts: int, replicas: int, *, permute: bool) -> PlacementPlan:
    """Random homes (Megatron's own without `permute`) and up to so many replicas."""
    homes_LE = np.stack([rng.permutation(experts) if permute else np.arange(experts) for _ in range(layers)])
    home_rank = np.empty_like(homes_LE)
    np.put_along_axis(home_rank, homes_LE, np.repeat(np.arange(ranks), experts // ranks)[None], 1)
    hosts = home_rank[:, :, None] == np.arange(ranks)
    per_rank = replicas // ranks
    for layer in range(layers):
        for rank in range(ranks):
            free = np.flatnonzero(~hosts[layer, :, rank])
            hosts[layer, rng.choice(free, min(per_rank, free.size), replace=False), rank] = True
    return PlacementPlan.from_hosts(home_rank, hosts, replica_slots_per_rank=per_rank)


def losses_with_replicas(setup: Setup, steps: int, replicas: int, every: int = 3) -> list[float]:
    training = Training(setup)
    layers = live_layers([training.model], training.config)
    return_gradients_before_reduction([training.model], layers)
    if not setup.overlap:
        send_replicas_ahead(layers)
    rng, ranks = np.random.default_rng(0), parallel_state.get_expert_model_parallel_world_size()
    losses = []
    for step in range(steps):
        if step % every == 0:
            plan = random_plan(rng, len(layers), ranks, setup.experts, replicas, permute=False)
            for live in layers:
                live.apply(plan, np.zeros(ranks, dtype=np.int64))
        losses += training.losses(1)
        for live in layers:
            if live.replicas is not None:
                live.replicas.renew()
    return losses


def stock_losses(setup: Setup, steps: int) -> list[float]:
    return Training(setup).losses(steps)
