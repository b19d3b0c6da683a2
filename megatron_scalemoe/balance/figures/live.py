"""What live balance did to the steps, measured: load of ranks step by step, time of a step, time spent on replicas and replanning."""

from __future__ import annotations

import collections
import statistics
import time

import torch
from megatron.core import parallel_state

from megatron_scalemoe.balance.layers import LiveLayer
from megatron_scalemoe.mcore.metrics import load_of_ranks

# That are kept for `gather`, which may never be called.
_MOST_STEPS = 1000


class StepFigures:
    """Collects figures of this rank's steps; `gather` makes those of the pipeline stage. Host clock: on CUDA, times of enqueuing."""

    def __init__(self, layers: list[LiveLayer]):
        self._layers = layers
        self._clear()

    def end_step(self) -> None:
        """Call at the end of each step."""
        now = time.perf_counter()
        rows_L = [live.layer.token_dispatcher.rows_computed for live in self._layers]
        self._rows_SL.append([rows - before for rows, before in zip(rows_L, self._rows_before_L, strict=True)])
        self._rows_before_L = rows_L
        if self._step_began is not None:
            self._step_s.append(now - self._step_began)
        self._step_began = now

    def add_exposed(self, time_s: float) -> None:
        """Count time that training waited for us between two steps; it is not part of the next step."""
        self._exposed_s += time_s
        if self._step_began is not None:
            self._step_began += time_s

    def gather(self, iteration: int) -> dict:
        """Since the last call: steps, their median time, the largest over mean rank load of each step (mean over steps and layers, and its
        95th percentile), and mean times per step. Largest of all ranks for times. Collective over the pipeline stage."""
        balance_SL = _max_over_mean(load_of_ranks(torch.tensor(list(self._rows_SL)).view(len(self._rows_SL), len(self._layers))))
        steps = len(self._rows_SL)
        replica_s = sum(live.replica_time_s for live in self._layers) - self._replica_before_s
        times = [statistics.median(self._step_s) if self._step_s else 0.0, replica_s / steps, self._exposed_s / steps]
        step_s, replica_s, exposed_s = _largest_of_ranks(times)
        self._clear()
        return {
            "event": "interval",
            "iteration": iteration,
            "steps": steps,
            "step_ms": step_s * 1e3,
            "replica_ms": replica_s * 1e3,
            "exposed_ms": exposed_s * 1e3,
            "max_over_mean": float(balance_SL.mean()),
            "max_over_mean_p95": float(balance_SL.quantile(0.95)),
        }

    def _clear(self) -> None:
        self._rows_before_L = [live.layer.token_dispatcher.rows_computed for live in self._layers]
        self._replica_before_s = sum(live.replica_time_s for live in self._layers)
        self._rows_SL: collections.deque[list[int]] = collections.deque(maxlen=_MOST_STEPS)
        self._step_s: collections.deque[float] = collections.deque(maxlen=_MOST_STEPS)
        self._step_began: float | None = None
        self._exposed_s = 0.0


def _max_over_mean(load_SLG: torch.Tensor) -> torch.Tensor:
    """float64 [S, L], 1 where nothing was computed."""
    load_SLG = load_SLG.double()
    mean_SL = load_SLG.mean(2)
    return torch.where(mean_SL > 0, load_SLG.amax(2) / mean_SL.clamp(min=1e-300), 1.0)


def _largest_of_ranks(values: list[float]) -> list[float]:
    largest = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=stage)
    return largest.tolist()
