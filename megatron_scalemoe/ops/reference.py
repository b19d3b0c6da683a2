"""Plain-torch twins of the ops: slow, obvious, and differentiated by autograd alone. Tests compare against them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def permute(x_ND: Tensor, index_M: Tensor) -> Tensor:
    """Twin of `ops.permute.permute`."""
    return x_ND[index_M]


def unpermute(x_MD: Tensor, index_M: Tensor, num_rows: int) -> Tensor:
    """Twin of `ops.permute.unpermute`."""
    zeros = torch.zeros(num_rows, x_MD.shape[1], dtype=torch.float64, device=x_MD.device)
    return zeros.index_add(0, index_M, x_MD.double()).to(x_MD.dtype)


def ragged_all_to_all(x: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Twin of `ops.ragged.ragged_all_to_all`, by gathering everything everywhere as Python objects. No gradient."""
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, (x.detach().cpu(), list(input_splits)), group=group)
    me = group.rank()
    blocks = [rows[sum(splits[:me]) : sum(splits[: me + 1])] for rows, splits in gathered]
    assert [block.shape[0] for block in blocks] == list(output_splits), "splits disagree between ranks"
    return torch.cat(blocks).to(x.device)


def moe_layer(x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor, expert_fn) -> Tensor:
    """What every dispatcher computes, with all experts at hand: sum over a token's experts of prob x expert(token).

    expert_fn(e, x [n, D], probs [n]) -> [n, D] applies logical expert e and its probabilities.
    """
    y_TD = torch.zeros_like(x_TD)
    for e in range(probs_TE.shape[1]):
        tokens = routing_map_TE[:, e].nonzero()[:, 0]
        y_TD = y_TD.index_add(0, tokens, expert_fn(e, x_TD[tokens], probs_TE[tokens, e]))
    return y_TD
