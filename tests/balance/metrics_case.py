"""Inside a pool rank: figures of layers in a training run, and what a brute-force count of the same steps says; the check of nodes."""

from __future__ import annotations

from tests.balance.live_case import make_live, random_plan  # first: it installs the CPU ranks

# isort: split
import dataclasses
from functools import partial
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_scalemoe.balance import node_order
from megatron_scalemoe.balance.metrics import LayerMeter
from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.live_model import megatron_groups
from tests.mcore.megatron_case import initialize
from tests.mcore.tiny_gpt import Setup

STEPS = 3


def measured(setup: Setup, config: ScaleMoEConfig, place: bool) -> tuple[list[dict], dict]:
    """Figures of some steps, from the second on under a random plan with `place`; and what hooks have counted on all ranks.

    counted: rows that experts computed, by layer and rank [L, G]; by layer (token, expert) pairs after drops, and (token, other block of
    experts) pairs under Megatron's own placement.
    """
    training, live = make_live(setup, config)
    meter = LayerMeter(live)
    assert meter.gather()[0].max_over_mean == 1.0
    ranks, rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
    rows_LG, pairs_LX = torch.zeros(len(live.layers), ranks, dtype=torch.int64), torch.zeros(len(live.layers), 2, dtype=torch.int64)
    for index, live_layer in enumerate(live.layers):
        live_layer.experts.register_forward_pre_hook(partial(_count_rows, rows_LG[index], rank))
        live_layer.layer.router.register_forward_hook(partial(_count_pairs, pairs_LX[index], ranks, rank))
    for step in range(1, STEPS + 1):
        if place and step == 2:
            live.adopt(random_plan(live.plan, np.random.default_rng(5), permute=True))
        training.losses(1)
        live.step_done(step)
    figures = [dataclasses.asdict(layer) for layer in meter.gather()]
    torch.distributed.all_reduce(rows_LG)
    torch.distributed.all_reduce(pairs_LX)
    return figures, {"rows": rows_LG.tolist(), "kept": pairs_LX[:, 0].tolist(), "left": pairs_LX[:, 1].tolist()}


def _count_rows(rows_G: torch.Tensor, rank: int, experts, inputs: tuple) -> None:
    rows_G[rank] += inputs[0].shape[0]


def _count_pairs(pairs: torch.Tensor, ranks: int, rank: int, router, inputs: tuple, output: tuple) -> None:
    wanted_TG = output[1].unflatten(1, (ranks, -1)).any(2)
    pairs += torch.stack([output[1].sum(), wanted_TG.sum() - wanted_TG[:, rank].sum()])


def node_order_problem(of_plan, of_topology, host_of_rank: str) -> str:
    """What `check_node_order` says on four expert-parallel ranks when each is on its host."""
    initialize(1, 4, 1)
    host = host_of_rank[torch.distributed.get_rank()]
    with mock.patch.object(node_order.socket, "gethostname", return_value=host):
        try:
            node_order.check_node_order(of_plan, of_topology, megatron_groups())
        except ScaleMoEError as error:
            return str(error)
    return ""
