"""Where a run's results go: runs/<name>/ with JSON files, TensorBoard scalars, Megatron's log line and a progress bar."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.balance.metrics import LayerFigures
from megatron_scalemoe.balance.writers import write_events, write_figures
from megatron_scalemoe.environment import describe_environment


class RunLog:
    """Owns the run's directory, its TensorBoard writer and the progress bar. Only rank 0 writes; elsewhere every call does nothing."""

    def __init__(self, args, directory: pathlib.Path):
        self.directory = directory
        self.args = args
        self.is_first_rank = torch.distributed.get_rank() == 0
        self.history: list[dict] = []
        self.events: list[dict] = []  # of live balance
        self.events_written = 0
        self.interval_start = time.perf_counter()
        self.writer = self.bar = None
        if self.is_first_rank:
            directory.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(args.tensorboard_dir or str(directory / "tensorboard"))
            self.bar = tqdm(total=args.train_iters, unit="it", file=sys.stderr, mininterval=0.5)
            self.write_json("config.json", {"args": _plain(vars(args)), "env": describe_environment(sys.argv)})

    def log_interval(
        self,
        iteration: int,
        losses: list[float],
        grad_norm: float,
        lr: float,
        moe_losses: dict[str, float],
        load: float | None,
        skipped: int,
    ) -> None:
        """Report the iterations with these losses, of which `iteration` is the last."""
        elapsed_s = (time.perf_counter() - self.interval_start) / len(losses)
        loss = sum(losses) / len(losses)
        tokens_per_s = self.args.global_batch_size * self.args.seq_length / elapsed_s
        if self.is_first_rank:
            record = {"iteration": iteration, "lm_loss": loss, **moe_losses, "grad_norm": grad_norm, "learning_rate": lr}
            record["tokens_per_s"] = tokens_per_s
            if load is not None:
                record["max_over_mean_load"] = load
            self.history.append(record)
            self.add_scalars(iteration, {name: value for name, value in record.items() if name != "iteration"})
            self.bar.update(len(losses))
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s" + (f", load {load:.2f}" if load else ""))
            self.say(_megatron_line(self.args, record, moe_losses, elapsed_s, skipped))
        self.interval_start = time.perf_counter()

    def log_validation(self, iteration: int, loss: float) -> None:
        if self.is_first_rank:
            self.history.append({"iteration": iteration, "validation_loss": loss})
            self.add_scalars(iteration, {"validation_loss": loss})
            self.say(f" validation loss at iteration {iteration} | lm loss value: {loss:.6E}")
        self.interval_start = time.perf_counter()

    def start(self, first_iteration: int) -> None:
        """Training starts after this iteration."""
        if self.is_first_rank:
            self.bar.reset(total=self.args.train_iters)
            self.bar.update(first_iteration)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last report out of the next one's speed."""
        self.interval_start = time.perf_counter()

    def add_scalars(self, iteration: int, values: dict[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)

        self._write(write)

    def add_layers(self, iteration: int, live: LiveBalance, figures: list[LayerFigures]) -> None:
        """What Megatron-LM's scripts write with ScaleMoE, under the same names."""

        def write(writer: SummaryWriter) -> None:
            write_figures(writer, None, figures, iteration, per_layer=False)
            write_events(writer, None, live.events_since(self.events_written), iteration)

        self._write(write)
        self.events_written = live.num_events

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """To TensorBoard's file, on rank 0; a full disk under it must not end the training."""
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:  # of the thread that writes
            self.say(f" TensorBoard's file cannot be written, training goes on without it: {error}")
            self.writer = None

    def say(self, text: str) -> None:
        if self.is_first_rank:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def say_from_any(self, text: str) -> None:
        """As `say`, on whichever rank it is called."""
        if self.is_first_rank:
            self.say(text)
        else:
            print(text, flush=True)

    def write_json(self, name: str, content) -> None:
        if self.is_first_rank:
            temporary = self.directory / f".{name}.tmp"
            temporary.write_text(json.dumps({"schema_version": 1, **content}, indent=1))
            temporary.replace(self.directory / name)

    def close(self) -> None:
        self.write_json("train.json", {"history": self.history, "events": self.events})
        if self.is_first_rank:
            self.bar.close()
        self._write(SummaryWriter.close)


def _megatron_line(args, record: dict, moe_losses: dict[str, float], elapsed_s: float, skipped: int) -> str:
    """The log line that Megatron's users and their scripts know."""
    iteration = record["iteration"]
    auxiliary = "".join(f" {name}: {loss:.6E} |" for name, loss in moe_losses.items())
    return (
        f" iteration {iteration:8d}/{args.train_iters:8d} | consumed samples: {iteration * args.global_batch_size:12d} |"
        f" elapsed time per iteration (ms): {elapsed_s * 1e3:.1f} | learning rate: {record['learning_rate']:.6E} |"
        f" global batch size: {args.global_batch_size:5d} | lm loss: {record['lm_loss']:.6E} |{auxiliary}"
        f" grad norm: {record['grad_norm']:.3f} | number of skipped iterations: {skipped:3d} |"
    )


def _plain(values: dict) -> dict:
    return {name: value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value) for name, value in values.items()}
