"""Other models of Table II beside ours: each has the same published time and at most two constants, fitted on the same two cells.

python examples/scalemoe_paper/alternatives.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from checks import gap_comes_out, stages_in_order
from network import EXCHANGES, NETWORKS
from paper import LOCAL_SHARE_BY_REPLICAS, REPLICAS, TABLE_II_S
from predict import FITTED_SC, NETWORK_OF_COLUMN, Simulated, predict_from, simulate

from megatron_scalemoe.cli.common import OK, format_table

Model = Callable[[Simulated], np.ndarray]


def ours(simulated: Simulated) -> np.ndarray:
    """Each model gives float64 [S, C], seconds per iteration."""
    return predict_from(simulated, TABLE_II_S)[1]


def time_per_exchange(simulated: Simulated) -> np.ndarray:
    """What bandwidth leaves of the adaptive stage is a fixed time per exchange, however few rows leave their rank."""
    rows_R = np.full(simulated.remote_rows_R.shape, float(EXCHANGES))
    return ours(dataclasses.replace(simulated, remote_rows_R=rows_R))


def all_bandwidth(simulated: Simulated) -> np.ndarray:
    """Ragged exchanges take all of the adaptive stage's time on the links: they reach only a (fitted) part of their bandwidth."""
    constants, seconds_SC = predict_from(simulated, TABLE_II_S)
    slowdown = (seconds_SC[1, 0] - constants.non_communication_s) / simulated.link_s_RW[0, 0]
    return ours(dataclasses.replace(simulated, link_s_RW=simulated.link_s_RW * slowdown))


def slow_network(simulated: Simulated) -> np.ndarray:
    """Padding is no more than it takes to drop no token; instead, all exchanges reach only a (fitted) part of the bandwidth."""
    constants, seconds_SC = predict_from(simulated, TABLE_II_S)
    slowdown = (seconds_SC[0, 0] - constants.non_communication_s) / simulated.padded_s(simulated.most_tokens)[0]
    links = {name: getattr(simulated, name) * slowdown for name in ("link_s_RW", "padded_s_W1", "padded_s_W2")}
    return ours(dataclasses.replace(simulated, **links))


def main() -> int:
    """Prints one line per model."""
    simulated = {replicas: simulate(local_share=LOCAL_SHARE_BY_REPLICAS[replicas]) for replicas in (7, REPLICAS, 31)}
    models: dict[str, Model] = {"time per exchange": time_per_exchange, "all bandwidth": all_bandwidth, "slow network": slow_network}
    seconds = {f"ours, {replicas} replicas": ours(each) for replicas, each in simulated.items()}
    seconds |= {name: model(simulated[REPLICAS]) for name, model in models.items()}
    lines = [_line(name, seconds_SC) for name, seconds_SC in seconds.items()]
    print(format_table(["model", *(f"{network}: the four stages" for network in NETWORKS), "rms error", "order", "gap"], lines))
    return OK


def _line(name: str, seconds_SC: np.ndarray) -> list[str]:
    columns = [seconds_SC[:, NETWORK_OF_COLUMN.index(i)] for i in range(len(NETWORKS))]
    stages = [" ".join(f"{s:5.2f}" for s in column) for column in columns]
    error = np.sqrt(np.mean((seconds_SC / TABLE_II_S - 1)[~FITTED_SC] ** 2))
    good = (stages_in_order(seconds_SC).all(), gap_comes_out(seconds_SC, TABLE_II_S))
    return [name, *stages, f"{error:.1%}", *("yes" if each else "NO" for each in good)]


if __name__ == "__main__":
    sys.exit(main())
