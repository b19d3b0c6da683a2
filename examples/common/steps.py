"""One training step and one evaluation, as Megatron's own training loop does them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from data import BatchShape, batches
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from model import Training
from task import Task
from torch import Tensor

from megatron_scalemoe.balance.sequences.learned_placement import LearnedPlacement


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and validation text and how a batch is cut from them."""

    task: Task
    train: Tensor
    valid: Tensor
    shape: BatchShape
    seed: int
    device: torch.device
    sequences: LearnedPlacement | None = None  # of training sequences


def train_step(training: Training, data: Data, iteration: int) -> tuple[float, float, bool]:
    """Forward, backward and update for one global batch. Returns the loss (mean over all ranks), the gradient norm, and whether the
    update was done (False when a gradient was not finite)."""
    training.model.train()
    training.model.zero_grad_buffer()
    training.optimizer.zero_grad()
    micro_batches = batches(data.train, data.seed, iteration, data.shape, data.task, data.device, data.sequences)
    loss = _run(training, data, micro_batches, forward_only=False)
    updated, grad_norm, _ = training.optimizer.step()
    training.scheduler.step(increment=1)
    return loss, float(grad_norm), bool(updated)


@torch.no_grad()
def evaluate(training: Training, data: Data, iters: int) -> float:
    """Mean loss over `iters` validation batches, always the same ones."""
    training.model.eval()
    batches_I = (batches(data.valid, data.seed + 1, i, data.shape, data.task, data.device) for i in range(iters))
    return sum(_run(training, data, micro_batches, forward_only=True) for micro_batches in batches_I) / iters


def _run(training: Training, data: Data, micro_batches: Iterator[dict[str, Tensor]], *, forward_only: bool) -> float:
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, data.task),
        data_iterator=micro_batches,
        model=[training.model],
        num_microbatches=data.shape.num_micro_batches,
        seq_length=data.shape.seq_length,
        micro_batch_size=data.shape.micro_batch_size,
        forward_only=forward_only,
    )
    return _mean_over_ranks(losses, data.device)


def _forward_step(task: Task, micro_batches: Iterator[dict[str, Tensor]], model: torch.nn.Module):
    batch = next(micro_batches)
    return task.forward(model, batch), functools.partial(_mean_loss, batch.get("loss_mask"))


def _mean_loss(loss_mask: Tensor | None, per_token_loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    per_token_loss = per_token_loss.float()
    loss = per_token_loss.mean() if loss_mask is None else (per_token_loss * loss_mask).sum() / loss_mask.sum()
    return loss, {"lm loss": loss.detach().clone()}  # the schedule divides the loss in place


def _mean_over_ranks(losses: list[dict[str, Tensor]], device: torch.device) -> float:
    """Mean loss of all micro-batches of all data-parallel ranks, on every rank: only the last pipeline stage has losses."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += torch.tensor([float(sum(loss["lm loss"] for loss in losses)), len(losses)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])
