"""The training run from start to end: set up, resume, train, evaluate, save, compare."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import statistics

import torch
from compare import compare_dispatchers
from data import BatchShape, load_text
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model import Training, build_training
from results import RunLog
from steps import Data, evaluate, train_step
from task import Task

from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.balance.metrics import LayerMeter
from megatron_scalemoe.balance.writers import format_figures
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import check_ranks_agree
from megatron_scalemoe.faults.dead_ranks import naming_dead_ranks
from megatron_scalemoe.mcore import live_model
from megatron_scalemoe.mcore.checkpoint.checkpoint import check_checkpoint_support, load_checkpoint, save_checkpoint
from megatron_scalemoe.mcore.metrics import mean_aux_losses


def train(args: argparse.Namespace, task: Task) -> None:
    """Run the whole thing on this rank."""
    timeout_s = args.distributed_timeout_minutes * 60
    with _process_groups(args, timeout_s), naming_dead_ranks(timeout_s):
        data = make_data(args, task)
        training = build_training(args, task, args.scalemoe)
        check_checkpoint_support(training.optimizer)
        log = RunLog(args, pathlib.Path(args.results_dir) / args.run_name)
        live = live_balance(args, training, data, log)
        if live is not None and live.sequences is not None:
            data = dataclasses.replace(data, sequences=live.sequences)
        first = load(args, training, live)
        save_to = args.save or str(log.directory / "checkpoints")
        train_loop(args, training, live, data, log, first, save_to)
        table = ""
        if args.compare_iters:
            table = compare_dispatchers(args, data, save_to, log)
        log.close()
        if torch.distributed.get_rank() == 0:
            print(_summary(args, log, save_to, table), flush=True)


@contextlib.contextmanager
def _process_groups(args: argparse.Namespace, timeout_s: float):
    """torch.distributed, Megatron's parallel groups and the seeds; taken down at the end."""
    on_cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        # the default run name is the time of start, which may differ between ranks
        run_name = [args.run_name]
        torch.distributed.broadcast_object_list(run_name)
        args.run_name = run_name[0]
        check_ranks_agree(vars(args))
        _check_world_size(args)
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            distributed_timeout_minutes=args.distributed_timeout_minutes,
            create_gloo_process_groups=on_cuda,
        )
        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed)
        yield
    finally:
        torch.distributed.destroy_process_group()


def _check_world_size(args: argparse.Namespace) -> None:
    world, tp, pp = torch.distributed.get_world_size(), args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or tp
    ep = args.expert_model_parallel_size
    if world % (tp * pp) or world % (expert_tp * ep * pp):
        raise ScaleMoEError(
            "the number of ranks must be a multiple of TP x PP and of expert-TP x EP x PP",
            found=f"{world} ranks, TP {tp}, PP {pp}, expert-TP {expert_tp}, EP {ep}",
            try_="another --nproc_per_node, or smaller parallel sizes",
        )


def make_data(args: argparse.Namespace, task: Task) -> Data:
    train_text, valid_text = load_text(args.data_path)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    shape = BatchShape(args, *ranks, min(train_text, valid_text, key=len))
    return Data(task, train_text, valid_text, shape, args.seed, device)


def live_balance(args: argparse.Namespace, training: Training, data: Data, log: RunLog) -> LiveBalance | None:
    """What moves experts and replicas while the model trains; None with stock Megatron."""
    if args.scalemoe is None:
        return None
    sizes = {"micro_batches": data.shape.num_micro_batches, "micro_batch_size": data.shape.micro_batch_size}
    return live_model.live_balance([training.model], training.optimizer, training.config, args.scalemoe, **sizes, say=log.say_from_any)


def load(args: argparse.Namespace, training: Training, live: LiveBalance | None) -> int:
    """Resume from `--load` and return the iteration to continue from, 0 for a fresh run or with `--no-load-optim`."""
    if args.load is None:
        return 0
    loaded = load_checkpoint(
        args.load,
        [training.model],
        training.optimizer,
        training.scheduler,
        iteration=args.ckpt_step,
        weights_only=args.no_load_optim,
    )
    if live is not None:
        live.resume(loaded.path)
    if torch.distributed.get_rank() == 0:
        print(f" loaded checkpoint from {args.load} at iteration {loaded.iteration}", flush=True)
    return 0 if args.no_load_optim else loaded.iteration


def train_loop(args, training: Training, live: LiveBalance | None, data: Data, log: RunLog, first: int, save_to: str) -> None:
    """Train from iteration `first` to `--train-iters`, with reports, evaluation and checkpoints at their intervals."""
    skipped, losses = 0, []
    for_log, for_table = (LayerMeter(live), LayerMeter(live)) if live is not None else (None, None)
    log.start(first)
    for iteration in range(first + 1, args.train_iters + 1):
        loss, grad_norm, updated = train_step(training, data, iteration)
        if live is not None:
            live.step_done(iteration)
            log_layers(args, for_table, iteration, log)
        check_finite(loss, grad_norm, updated, iteration)
        losses.append(loss)
        skipped += not updated
        last = iteration == args.train_iters
        if iteration % args.log_interval == 0 or last:
            lr = training.optimizer.param_groups[0]["lr"]
            moe = mean_aux_losses(training.config, len(losses) * data.shape.num_micro_batches) if args.num_experts else {}
            load = None
            if for_log is not None:
                figures = for_log.gather()
                load = statistics.mean(layer.max_over_mean for layer in figures)
                log.add_layers(iteration, live, figures)
            log.log_interval(iteration, losses, grad_norm, lr, moe, load, skipped)
            losses = []
        if iteration % args.eval_interval == 0 or last:
            log.log_validation(iteration, evaluate(training, data, args.eval_iters))
        if iteration % args.save_interval == 0 or last:
            files = live.checkpoint_files() if live is not None else {}
            save_checkpoint(save_to, iteration, [training.model], training.optimizer, training.scheduler, files=files)
            log.restart_clock()
    if live is not None:
        live.close()
        log.events = list(live.events)


def check_finite(loss: float, grad_norm: float, updated: bool, iteration: int) -> None:
    """As Megatron's `--check-for-nan-in-loss-and-grad`: raises on every rank, before a checkpoint of such a model becomes the latest."""
    if not math.isfinite(loss) or (updated and not math.isfinite(grad_norm)):
        found = f"loss {loss}, gradient norm {grad_norm} in iteration {iteration}"
        raise ScaleMoEError("loss and gradients must be finite", found=found, try_="a lower --lr, from the last checkpoint")


def log_layers(args: argparse.Namespace, meter: LayerMeter, iteration: int, log: RunLog) -> None:
    """A table of all MoE layers every `--scalemoe-table-interval` iterations."""
    if args.scalemoe.table_interval and iteration % args.scalemoe.table_interval == 0:
        log.say(format_figures(meter.gather(), iteration))


def _summary(args: argparse.Namespace, log: RunLog, save_to: str, table: str) -> str:
    validation = [record["validation_loss"] for record in log.history if "validation_loss" in record]
    last_loss = f" (validation loss {validation[-1]:.4f})" if validation else ""
    ranks = torch.distributed.get_world_size()
    return f"""
Trained {args.train_iters} iterations on {ranks} ranks with --moe-dispatcher {args.moe_dispatcher}{last_loss}.
{table}
  results       {os.path.relpath(log.directory)}/*.json
  checkpoints   {os.path.relpath(save_to)}
  TensorBoard   tensorboard --logdir {os.path.relpath(args.tensorboard_dir or log.directory / "tensorboard")}

Next, go on from the last checkpoint: the same command with
  --load {os.path.relpath(save_to)} --train-iters {args.train_iters + 100}"""
