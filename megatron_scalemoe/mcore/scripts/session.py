"""One training run of Megatron-LM with ScaleMoE: what `megatron_lm` calls at each place of Megatron's training program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.data import DataLoader

from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.balance.metrics import LayerMeter
from megatron_scalemoe.balance.sequences.sampler import PlacedBatchSampler
from megatron_scalemoe.balance.writers import format_figures, write_events, write_figures
from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.faults.agreement import check_ranks_agree
from megatron_scalemoe.mcore.checkpoint.directory import write_beside
from megatron_scalemoe.mcore.live_model import live_balance
from megatron_scalemoe.mcore.support import check_script

_OF_ONE_RANK = ("rank", "local_rank")


class TrainingSession:
    """Owns `live`, which is None until `start`, and the meters of the layers. Every method is called on all ranks."""

    def __init__(self, scalemoe: ScaleMoEConfig):
        self._scalemoe = scalemoe
        self.live: LiveBalance | None = None
        self._for_writers: LayerMeter | None = None
        self._for_terminal: LayerMeter | None = None
        self._events_written = 0

    def check(self, args: argparse.Namespace) -> None:
        """Before the model is built. Raises `ScaleMoEError` if flags do not go together, or differ between ranks.

        Turns `args.dist_ckpt_optim_fully_reshardable` on where Megatron's default would save experts in an order that only we can read.
        """
        settings = {name: value for name, value in vars(args).items() if name not in _OF_ONE_RANK}
        check_ranks_agree(settings | {"scalemoe": self._scalemoe})
        check_script(args, self._scalemoe)
        if self._scalemoe.grouped_experts and args.use_distributed_optimizer and args.save and not args.dist_ckpt_optim_fully_reshardable:
            args.dist_ckpt_optim_fully_reshardable = True
            if dist.get_rank() == 0:
                _say("scalemoe: saving with --dist-ckpt-optim-fully-reshardable, as grouped experts lie in another order than Megatron's")

    def start(self, args: argparse.Namespace, model: list[torch.nn.Module], optimizer: Any, config: TransformerConfig, micro_batches: int):
        """When model and optimizer are built, and loaded. Raises `ScaleMoEError` if the plan, topology or model do not fit this job."""
        sizes = {"micro_batches": micro_batches, "micro_batch_size": args.micro_batch_size}
        self.live = live_balance(model, optimizer, config, self._scalemoe, **sizes, say=_say)
        if args.tensorboard_dir or args.wandb_project:
            self._for_writers = LayerMeter(self.live)
        if self._scalemoe.table_interval:
            self._for_terminal = LayerMeter(self.live)

    def placing_sequences(self, loader: DataLoader | None) -> DataLoader | None:
        """The training data's loader, with the sequences of each global batch placed if that was asked for."""
        sequences = self.live and self.live.sequences
        if not sequences or loader is None:
            return loader
        dataset = loader.dataset

        def tokens_of(ids: list[int]) -> np.ndarray:
            return np.stack([np.asarray(dataset[sample]["tokens"]) for sample in ids])

        return DataLoader(
            dataset,
            batch_sampler=PlacedBatchSampler(loader.batch_sampler, sequences, tokens_of),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            worker_init_fn=loader.worker_init_fn,
        )

    def step_done(self, iteration: int, micro_batches: int) -> None:
        """After the optimizer step of this iteration."""
        self.live.step_done(iteration, micro_batches)

    def report(self, args: argparse.Namespace, iteration: int, tensorboard: Any, wandb: Any) -> None:
        """After Megatron's own log of this iteration. tensorboard, wandb: Megatron's writers, on the last rank, where it has them."""
        if self._for_writers is not None and iteration % args.tensorboard_log_interval == 0:
            figures = self._for_writers.gather()
            write_figures(tensorboard, wandb, figures, iteration, per_layer=args.moe_per_layer_logging)
            write_events(tensorboard, wandb, self.live.events_since(self._events_written), iteration)
            self._events_written = self.live.num_events
        if self._for_terminal is not None and iteration % self._scalemoe.table_interval == 0:
            text = format_figures(self._for_terminal.gather(), iteration)
            if dist.get_rank() == dist.get_world_size() - 1:  # where Megatron prints its log
                print(text, flush=True)

    def save_beside(self, checkpoint: Path) -> None:
        """Put the plan beside a checkpoint that Megatron has written, or begun to write."""
        if self.live is None:
            return
        files = self.live.checkpoint_files()
        if dist.get_rank() == 0:
            write_beside(checkpoint, files)

    def close(self) -> None:
        """After the last step."""
        self.live.close()


def _say(text: str) -> None:
    print(text, flush=True)
