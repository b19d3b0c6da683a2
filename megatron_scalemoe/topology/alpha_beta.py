"""Fits the alpha-beta model (Hockney 1994) to measured times of messages: time = alpha_us + bytes / bandwidth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


class AlphaBeta(NamedTuple):
    """residuals: of each message, (fitted - measured) / measured. r2: share of the times' variance that the fit explains, with the fit's
    weights; 1 at best."""

    alpha_us: float
    bandwidth_GBps: float
    residuals: tuple[float, ...]
    r2: float


def fit_alpha_beta(num_bytes: np.ndarray, time_us: np.ndarray) -> AlphaBeta:
    """Least squares of the relative errors, so that a message of 10 us counts as much as one of 10 ms; alpha is 0 or more.

    num_bytes, time_us: [n], one message each. Raises `ScaleMoEError` unless there are two sizes, all times are above 0, and larger messages
    take longer: otherwise no bandwidth can be told.
    """
    num_bytes, time_us = np.asarray(num_bytes, dtype=np.float64), np.asarray(time_us, dtype=np.float64)
    if not (np.isfinite(time_us).all() and (time_us > 0).all()):
        raise ScaleMoEError("measured times must be above 0", found=time_us.tolist(), try_="more --iters: the times are too noisy")
    if not (np.isfinite(num_bytes).all() and (num_bytes >= 0).all()) or np.unique(num_bytes).size < 2:
        raise ScaleMoEError("messages of two different sizes or more are needed", found=f"{num_bytes.tolist()} bytes")
    design = np.stack([1 / time_us, num_bytes / time_us], axis=1)
    # Bytes are large numbers and slopes small: columns of equal length keep the solution exact.
    scale = np.linalg.norm(design, axis=0)
    alpha_us, us_per_byte = np.linalg.lstsq(design / scale, np.ones(time_us.size), rcond=None)[0] / scale
    if alpha_us < 0:
        alpha_us, us_per_byte = 0.0, design[:, 1].sum() / (design[:, 1] ** 2).sum()
    if not us_per_byte * np.ptp(num_bytes) > 1e-9 * time_us.max():
        problem = "larger messages did not take longer: no bandwidth can be told"
        raise ScaleMoEError(
            problem, found=f"{time_us.round(1).tolist()} us for {num_bytes.astype(int).tolist()} bytes", try_="larger --sizes"
        )
    residuals = (alpha_us + us_per_byte * num_bytes) / time_us - 1
    weights = time_us**-2
    spread = (weights * (time_us - np.average(time_us, weights=weights)) ** 2).sum()
    r2 = 1.0 - float((residuals**2).sum() / spread) if spread else 1.0
    return AlphaBeta(float(alpha_us), float(1 / (us_per_byte * BYTES_PER_US_PER_GBps)), tuple(residuals.tolist()), r2)
