"""What is measured of the MoE layers while they train, gathered from all ranks: `StepMeter` for the log of live balance, step by step, of a
pipeline stage; `LayerMeter` for Megatron's writers and tables, layer by layer, of the whole model."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.balance.model import LiveLayer
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan

if TYPE_CHECKING:
    from megatron_scalemoe.balance.live import LiveBalance

# That are kept for `gather`, which may never be called.
_MOST_STEPS = 1000


class StepMeter:
    """Collects figures of this rank's steps: rows of each rank, times, time spent on replicas and replanning; `gather` makes those of the
    pipeline stage. Host clock: on CUDA, times of enqueuing."""

    def __init__(self, layers: list[LiveLayer], groups: Groups):
        self._layers, self._groups = layers, groups
        self._clear()

    @property
    def steps(self) -> int:
        """Ended since the last `gather`."""
        return len(self._rows_SL)

    def end_step(self) -> None:
        """Call at the end of each step."""
        now = time.perf_counter()
        rows_L = self._rows()
        self._rows_SL.append(rows_L - self._rows_before_L.to(rows_L.device))
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
        95th percentile), and mean times per step. Largest of all ranks for times. Collective over the pipeline stage; not after no step."""
        steps = self.steps
        balance_SL = _max_over_mean(self._load(torch.stack(list(self._rows_SL))))
        replica_s = self._replica_s() - self._replica_before_s
        times = [statistics.median(self._step_s) if self._step_s else 0.0, replica_s / steps, self._exposed_s / steps]
        largest = torch.tensor(times, dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.stage)
        step_s, replica_s, exposed_s = largest.tolist()
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

    def _load(self, rows_SL: torch.Tensor) -> torch.Tensor:
        """int64 [S, L] rows of this rank -> [S, L, G]: of each position in the expert-parallel group, all such groups together."""
        ep = self._groups.ep
        load_SLG = torch.zeros(*rows_SL.shape, ep.size(), dtype=torch.int64, device=torch.cuda.current_device())
        load_SLG[:, :, ep.rank()] = rows_SL.to(load_SLG.device)
        dist.all_reduce(load_SLG, group=self._groups.stage)
        return load_SLG.cpu()

    def _rows(self) -> torch.Tensor:
        return _together([live.layer.token_dispatcher.rows_computed for live in self._layers])

    def _replica_s(self) -> float:
        return sum(live.replica_time_s for live in self._layers)

    def _clear(self) -> None:
        self._rows_before_L, self._replica_before_s = self._rows(), self._replica_s()
        self._rows_SL: collections.deque[torch.Tensor] = collections.deque(maxlen=_MOST_STEPS)
        self._step_s: collections.deque[float] = collections.deque(maxlen=_MOST_STEPS)
        self._step_began: float | None = None
        self._exposed_s = 0.0


def _together(counts: list[int | torch.Tensor]) -> torch.Tensor:
    """int64 [number of counts], where the tensors among them are: nothing waits for a device."""
    device = next((count.device for count in counts if isinstance(count, torch.Tensor)), None)
    return torch.stack([torch.as_tensor(count, device=device) for count in counts]) if counts else torch.zeros(0, dtype=torch.int64)


def _max_over_mean(load_SLG: torch.Tensor) -> torch.Tensor:
    """float64 [S, L], 1 where nothing was computed."""
    load_SLG = load_SLG.double()
    mean_SL = load_SLG.mean(2)
    return torch.where(mean_SL > 0, load_SLG.amax(2) / mean_SL.clamp(min=1e-300), 1.0)


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One layer since the last `gather`. None: not known with this dispatcher or these flags.

    layer: Megatron's number, from 1. max_over_mean: of the rows that ranks computed, all steps together. sent_bytes: that a rank sent to
    others per step, mean over ranks, in the forward's dispatch and combine, without metadata. local_share: of the rows dispatched, those
    that stayed on their rank. drop_rate: of the (token, expert) selections, those beyond a capacity factor. replicas: in the plan now.
    homes_moved: experts that changed rank.
    """

    layer: int
    max_over_mean: float
    sent_bytes: float | None
    local_share: float | None
    drop_rate: float | None
    replicas: int
    homes_moved: int


class LayerMeter:
    """Remembers what `live`'s layers had counted at the last `gather`. Make it on all ranks at the same step."""

    def __init__(self, live: LiveBalance):
        self._live, self._groups, self._sizes = live, live.model.groups, live.model.sizes
        for layer in live.layers:
            layer.layer.token_dispatcher.counts_sent = True
        self._plan, self._before_LX, self._steps_before = live.plan, self._counted(), live.steps

    def gather(self) -> list[LayerFigures]:
        """Of all layers of the model, in order, since the last call. Collective over all ranks; one host synchronisation."""
        live, counted_LX = self._live, self._counted()
        shared_LX = counted_LX - self._before_LX
        shared_LX[:, -2:] = torch.from_numpy(self._placement_columns()).to(shared_LX.device)
        dist.all_reduce(shared_LX)
        steps = max(live.steps - self._steps_before, 1)
        figures = [self._figures(number, row_X, steps) for number, row_X in zip(live.model.layer_numbers, shared_LX.tolist(), strict=True)]
        self._plan, self._before_LX, self._steps_before = live.plan, counted_LX, live.steps
        return figures

    def _counted(self) -> torch.Tensor:
        """int64 [L, X] of this rank, on the device, L layers of the whole model: rows computed [G], in the column of the rank; selections;
        rows sent: stayed, left, padding; and two columns for the placement."""
        ep = self._groups.ep
        device, rows = torch.device(torch.cuda.current_device()), len(self._live.model.layer_numbers)
        counted_LX = torch.zeros(rows, ep.size() + 6, dtype=torch.int64, device=device)
        for live in self._live.layers:
            dispatcher = live.layer.token_dispatcher
            counts = _together([dispatcher.rows_computed, dispatcher.selections, *dataclasses.astuple(dispatcher.rows_sent)]).to(device)
            counted_LX[live.row, ep.rank()] = counts[0]
            counted_LX[live.row, ep.size() : -2] = counts[1:]
        return counted_LX

    def _placement_columns(self) -> np.ndarray:
        """int64 [L, 2]: replicas in the plan, and homes moved since the last call, on the first rank of each pipeline stage."""
        columns_L2 = np.zeros((len(self._before_LX), 2), dtype=np.int64)
        plan = self._live.plan
        if self._groups.stage.rank() == 0 and plan is not None:
            for live in self._live.layers:
                replicas = (plan.physical_to_logical[live.index] != EMPTY).sum() - plan.num_logical_experts
                columns_L2[live.row] = replicas, _homes_moved(self._plan, plan, live.index)
        return columns_L2

    def _figures(self, number: int, row_X: list[int], steps: int) -> LayerFigures:
        *load_G, selections, stayed, left, padding, replicas, homes_moved = row_X
        kept = (sum(load_G) - padding) / self._groups.expert_tp.size()  # each of these ranks computes its part of every row
        sent, row_bytes = stayed + left, self._sizes.hidden_size * self._sizes.dtype.itemsize
        return LayerFigures(
            layer=number,
            max_over_mean=max(load_G) * len(load_G) / sum(load_G) if sum(load_G) else 1.0,
            sent_bytes=2 * left * row_bytes / self._groups.stage.size() / steps if sent else None,
            local_share=stayed / sent if sent else None,
            drop_rate=max(0.0, 1 - kept / selections) if selections and not self._sizes.pads_to_capacity else None,
            replicas=replicas,
            homes_moved=homes_moved,
        )


def _homes_moved(before: PlacementPlan, now: PlacementPlan, layer: int) -> int:
    return int((before.home_rank[layer] != now.home_rank[layer]).sum())
