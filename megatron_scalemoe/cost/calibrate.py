"""The fixed overhead and the bandwidth that exchanges really reach, from `scalemoe bench dispatch --json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.optimize import nnls

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document
from megatron_scalemoe.typed import Facts, Number
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# `bench dispatch` times dispatch and combine, forward and backward.
EXCHANGES_PER_MEASUREMENT = 4
# Transports whose bytes no meter sees.
NOT_ON_THE_WIRE = ("shm", "cuda")


class _Row(Facts):
    dispatcher: str
    transport: str | None = None
    ranks: int = Field(ge=1)
    bytes_out: Number = Field(ge=0)
    median_ms: Number = Field(gt=0)


class _Bench(Facts):
    rows: list[_Row]


@dataclasses.dataclass(frozen=True, eq=False)
class ExchangeFit:
    """time = overhead_us + bytes of one rank / bandwidth_GBps, of one exchange. `inf` GB/s when the times do not grow with the bytes.

    residuals: float64, (fitted - measured) / measured, of each measurement.
    """

    overhead_us: float
    bandwidth_GBps: float
    residuals: np.ndarray

    def apply(self, cost: CostModel) -> CostModel:
        """`cost` with the measured overhead. The bandwidth belongs to the topology: compare, and override its links if they differ."""
        return cost.replaced(exchange_overhead_us=self.overhead_us)


def fit_exchange(bytes_per_rank: np.ndarray, time_us: np.ndarray) -> ExchangeFit:
    """Fits exchanges (float [K], [K]) by least squares of the relative error, so that small exchanges count too; neither part is negative.

    Raises `ScaleMoEError` unless there are two different sizes and all times are above 0.
    """
    sizes, times = np.asarray(bytes_per_rank, dtype=np.float64), np.asarray(time_us, dtype=np.float64)
    if np.unique(sizes).size < 2 or sizes.min() < 0 or not (np.isfinite(times).all() and times.min() > 0):
        problem = "calibration needs exchanges of two or more different sizes, all of them timed above 0"
        raise ScaleMoEError(problem, found=f"bytes {sizes.tolist()}, us {times.tolist()}")
    unit = sizes.max()  # so that both columns are of the order of 1
    (overhead, per_unit), _ = nnls(np.stack([1 / times, sizes / unit / times], axis=1), np.ones_like(times))
    bandwidth_GBps = float(unit / per_unit / BYTES_PER_US_PER_GBps) if per_unit > 0 else float("inf")
    return ExchangeFit(float(overhead), bandwidth_GBps, (overhead + per_unit * sizes / unit) / times - 1)


def fit_bench(paths: Sequence[Path], *, dispatcher: str = "scalemoe") -> ExchangeFit:
    """Fits the rows of one dispatcher, by collectives, in the JSON files that `scalemoe bench dispatch` wrote with different `--tokens`.

    Raises `ScaleMoEError` naming file and field, or that there are too few sizes.
    """
    rows = [row for path in paths for row in read_document(path).parse(_Bench).rows]
    rows = [row for row in rows if row.dispatcher == dispatcher and row.transport not in NOT_ON_THE_WIRE]
    bytes_per_rank = np.array([row.bytes_out / row.ranks / EXCHANGES_PER_MEASUREMENT for row in rows])
    if np.unique(bytes_per_rank).size < 2:
        problem = f"calibration needs bench results of the {dispatcher} dispatcher with two or more sizes"
        found = f"{np.unique(bytes_per_rank).size} in {', '.join(map(str, paths))}"
        raise ScaleMoEError(problem, found=found, try_="scalemoe bench dispatch with other --tokens, each written with -o")
    return fit_exchange(bytes_per_rank, np.array([row.median_ms * 1e3 / EXCHANGES_PER_MEASUREMENT for row in rows]))
