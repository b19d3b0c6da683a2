"""The ranks of `scalemoe bench live`: run by torchrun, writes its result as JSON from rank 0.

Shapes: G ranks, S steps, C calls of experts in a step (MoE layers x micro-batches).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time

import numpy as np
import torch.distributed as dist

from megatron_scalemoe.bench.worker import describe_device, run_worker, synchronize, use_megatron
from megatron_scalemoe.config import EXPERTS, ScaleMoEConfig

# Takes turns with the others; the last one trains afterwards, as its planner computes beside the steps.
STOCK, BARE, LIVE, BACKGROUND = "stock", "scalemoe", "live", "live, planner beside"


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step on one rank. calls_C3: of the experts, as in `ExpertMeter.take`. exposed_s: in `LiveBalance.step_done`, part of step_s."""

    loss: float
    step_s: float
    exposed_s: float
    replica_s: float
    calls_C3: list[list[float]]


class Variant:
    """One of what is compared: its training, with live balance if it has replicas, and the record of its steps."""

    def __init__(self, args: argparse.Namespace, scalemoe: ScaleMoEConfig | None):
        from megatron_scalemoe.bench.expert_meter import ExpertMeter
        from megatron_scalemoe.mcore.live_model import live_balance
        from megatron_scalemoe.mcore.small_gpt import SmallGPTTraining

        self._training = training = SmallGPTTraining(args, scalemoe)
        self._meter = ExpertMeter(training.moe_layers)
        self.live = None
        if scalemoe is not None and scalemoe.replicas:
            chunks = [training.model]
            self.live = live_balance(
                chunks, training.optimizer, training.config, scalemoe, micro_batches=args.micro_batches, say=lambda _: None
            )
        self._meter.take()  # live balance has measured the experts
        self.records: list[StepRecord] = []

    def step(self, iteration: int) -> None:
        """Train one step and record it."""
        replica_s = self._replica_s()
        dist.barrier()
        synchronize()
        began = time.perf_counter()
        loss = self._training.step(iteration)
        synchronize()
        trained = time.perf_counter()
        if self.live is not None:
            self.live.step_done(iteration)
        ended = time.perf_counter()
        calls_C3 = self._meter.take()
        self.records.append(StepRecord(float(loss), ended - began, ended - trained, self._replica_s() - replica_s, calls_C3))

    def _replica_s(self) -> float:
        return sum(live.experts.replica_time_s for live in self.live.layers) if self.live is not None else 0.0


def main() -> None:
    args = _parse_args()
    use_megatron()
    run_worker(functools.partial(_bench, args), args.result_file, args.timeout)


def _bench(args: argparse.Namespace) -> dict:
    from megatron_scalemoe.mcore.stock import expert_parallel_groups

    expert_parallel_groups(args.ranks)
    # counts of each step, so that the planner sees how they drift
    placing = {"replicas": args.replicas, "trace_interval": 1}
    runs = {
        STOCK: Variant(args, None),
        BARE: Variant(args, ScaleMoEConfig(experts=args.experts_module)),
        LIVE: Variant(args, ScaleMoEConfig(**placing, replan_interval=args.steps + 1)),
    }
    plans = []
    for iteration in range(1, args.steps + 1):
        for run in runs.values():
            run.step(iteration)
        if iteration % args.refresh == 0 and iteration < args.steps:
            began = time.perf_counter()
            runs[LIVE].live.replan_now(iteration)
            plans.append({"waited_s": time.perf_counter() - began, **_last_replan(runs[LIVE])})
    runs[LIVE].live.close()
    runs[BACKGROUND] = Variant(args, ScaleMoEConfig(**placing, replan_interval=args.refresh))
    for iteration in range(1, args.steps + 1):
        runs[BACKGROUND].step(iteration)
    runs[BACKGROUND].live.close()
    plans_beside = [event for event in runs[BACKGROUND].live.events if event["event"] == "replan"]
    tokens = args.ranks * args.micro_batches * args.micro_batch * args.seq
    gathered = {name: _gathered(run.records) for name, run in runs.items()}
    # before the first plan there are no replicas; the planner beside training answers some steps later
    first = dict.fromkeys(runs, args.refresh) | {BACKGROUND: next((plan["iteration"] for plan in plans_beside), args.refresh)}
    rows = [summarize(name, gathered, min(first[name], args.steps - 1), tokens) for name in runs]
    return {"rows": rows, "plans": plans, "plans_beside": plans_beside, "env": describe_device()}


def _last_replan(run: Variant) -> dict:
    """What the planner said, or that it failed."""
    return next(event for event in reversed(run.live.events) if event["event"] != "interval")


def _gathered(records: list[StepRecord]) -> dict[str, np.ndarray]:
    """Of all ranks: each field of `StepRecord` as float64 [G, S, ...]."""
    fields = [field.name for field in dataclasses.fields(StepRecord)]
    mine = {name: np.array([getattr(record, name) for record in records]) for name in fields}
    of_ranks = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {name: np.stack([of_rank[name] for of_rank in of_ranks]) for name in fields}


def summarize(name: str, gathered: dict[str, dict[str, np.ndarray]], warmup: int, tokens: int) -> dict:
    """The figures of one variant over its steps after the first `warmup`; `tokens` are those of one step.

    gathered: what all ranks recorded, by variant and field of `StepRecord`: calls_C3 [G, S, C, 3] and the others [G, S].
    The largest over mean rank load is one figure for every call of experts (a layer in a micro-batch), as ranks wait for each other there.
    Times of experts: of the slowest rank of every call, summed over a step. Other times: of the slowest rank of every step. The loss is
    compared in all steps.
    """
    from megatron_scalemoe.bench.expert_meter import CPU_S, ROWS, WALL_S

    of_ranks, stock = gathered[name], gathered[STOCK]
    loss_S = of_ranks["loss"].mean(0)
    calls_GSC3 = of_ranks["calls_C3"][:, warmup:]
    load_GSC, slowest_SC3 = calls_GSC3[..., ROWS], calls_GSC3.max(0)
    balance_SC = load_GSC.max(0) / load_GSC.mean(0)
    row = {
        "variant": name,
        "steps": len(balance_SC),
        "max_over_mean": float(balance_SC.mean()),
        "max_over_mean_p95": float(np.quantile(balance_SC, 0.95)),
        "max_over_mean_max": float(balance_SC.max()),
        "expert_ms": float(slowest_SC3[..., WALL_S].sum(1).mean()) * 1e3,
        "expert_cpu_ms": float(slowest_SC3[..., CPU_S].sum(1).mean()) * 1e3,
        "replica_ms": float(of_ranks["replica_s"].max(0)[warmup:].mean()) * 1e3,
        "exposed_ms": float(of_ranks["exposed_s"].max(0)[warmup:].mean()) * 1e3,
        "losses": loss_S.tolist(),
        "max_loss_error": float(np.abs(loss_S - stock["loss"].mean(0)).max()),
    }
    if name == BACKGROUND:  # it did not take turns with stock
        return row
    step_s, stock_step_s = (float(np.median(some["step_s"].max(0)[warmup:])) for some in (of_ranks, stock))
    return row | {"step_ms": step_s * 1e3, "tokens_per_s": tokens / step_s, "ratio_to_stock": step_s / stock_step_s}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    sizes = "ranks experts topk hidden ffn layers seq micro-batch micro-batches replicas steps refresh seed"
    for name in sizes.split():
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("zipf", "timeout"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--experts-module", choices=EXPERTS, required=True)
    parser.add_argument("--result-file", type=pathlib.Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
