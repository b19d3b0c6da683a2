"""Stock Megatron's parts that benchmarks measure against, each in the shape in which ours is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import TRANSPORTS, ScaleMoEConfig
from megatron_scalemoe.mcore.layers.token_dispatcher import ScaleMoETokenDispatcher


def expert_parallel_groups(ranks: int) -> ProcessGroupCollection:
    """Megatron's process groups of `ranks` expert-parallel ranks, which are all. Collective."""
    # gloo groups beside NCCL's; without GPUs all are gloo's
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, create_gloo_process_groups=torch.cuda.is_available())
    return moe_utils.get_default_pg_collection()


def one_layer_config(hidden: int, experts: int, topk: int, expert_parallel: int) -> TransformerConfig:
    """What token dispatchers need to know of a model."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        moe_ffn_hidden_size=hidden,  # no experts are built; Megatron warns without it
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_pre_softmax=True,  # top-1 needs it; nothing is routed here
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=expert_parallel,
        add_bias_linear=False,
    )


def make_dispatchers(
    names: Sequence[str], config: TransformerConfig, scalemoe: ScaleMoEConfig, pg_collection: ProcessGroupCollection
) -> dict[str, MoETokenDispatcher]:
    """Token dispatchers by name: Megatron's `alltoall` and `allgather`, our `padded` baseline, and `scalemoe` as configured.

    `scalemoe TRANSPORT` is the same over this transport. Collective over the dispatch group.
    """
    num_local = config.num_moe_experts // pg_collection.ep.size()
    local = [pg_collection.ep.rank() * num_local + i for i in range(num_local)]
    makers: dict[str, Callable[[], MoETokenDispatcher]] = {
        "alltoall": lambda: MoEAlltoAllTokenDispatcher(num_local, local, config=config, pg_collection=pg_collection),
        "allgather": lambda: MoEAllGatherTokenDispatcher(num_local, local, config=config, pg_collection=pg_collection),
        "padded": lambda: ScaleMoETokenDispatcher(ScaleMoEConfig(dispatch="padded"), config, pg_collection),
        "scalemoe": lambda: ScaleMoETokenDispatcher(scalemoe, config, pg_collection),
    }
    for transport in TRANSPORTS:
        over_it = scalemoe.replaced(transport=transport)
        makers[f"scalemoe {transport}"] = functools.partial(ScaleMoETokenDispatcher, over_it, config, pg_collection)
    return {name: makers[name]() for name in names}


def stock_permute(x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's unfused permutation: rows [R, D] and probabilities [R] in expert order, and what `stock_unpermute` needs."""
    return moe_utils.permute(x_TD, routing_map_TE, probs_TE, num_out_tokens=num_rows)


def stock_unpermute(rows_RD: Tensor, order_R: Tensor, num_tokens: int) -> Tensor:
    """Megatron's unfused sum of rows by token: [T, D]."""
    return moe_utils.unpermute(rows_RD, order_R, (num_tokens, rows_RD.shape[1]))
