"""The picture of a cluster: the bandwidth between every two ranks, so that slow nodes and links stand out."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.report.figures.common import Panel, Table, drawing, to_svg, whole_ticks
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import Routes

# Beyond this the cells are smaller than pixels, and tori take long.
MAX_RANKS = 128


def bandwidth_panel(topology: Topology, routes: Routes) -> Panel:
    """Heat map, rank x rank, of the bandwidth of each pair alone on the network. For 2 to `MAX_RANKS` ranks."""
    from matplotlib.colors import LogNorm

    bandwidth_GG = np.where(np.eye(topology.num_ranks, dtype=bool), np.nan, routes.bandwidth_GBps)
    low, high = float(np.nanmin(bandwidth_GG)), float(np.nanmax(bandwidth_GG))
    with drawing(6.6, 4.6) as figure:
        axis = figure.subplots()
        norm = LogNorm(low / 1.05, high * 1.05)
        image = axis.imshow(np.ma.masked_invalid(bandwidth_GG), cmap="viridis", norm=norm, interpolation="nearest")
        axis.spines[["top", "right"]].set_visible(True)
        axis.set(xlabel="to rank", ylabel="from rank")
        whole_ticks(axis.xaxis, axis.yaxis)
        bar = figure.colorbar(image, ax=axis)
        values = np.unique(bandwidth_GG[np.isfinite(bandwidth_GG)])
        ticks = values if values.size <= 6 else np.geomspace(low, high, 5)
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.set_label("bandwidth, GB/s (10^9 bytes a second)")
        svg = to_svg(figure, "bandwidth")
    title = _finding(topology, bandwidth_GG)
    alt = f"Heat map of the bandwidth from each of {topology.num_ranks} ranks to each other one. {title}."
    return Panel(title, alt, svg, _table(topology, routes, bandwidth_GG), "Each pair as if it had the network for itself.")


def _finding(topology: Topology, bandwidth_GG: np.ndarray) -> str:
    node_G = topology.node_of_rank
    same_GG = node_G[:, None] == node_G
    inside = bandwidth_GG[same_GG & np.isfinite(bandwidth_GG)]
    between = bandwidth_GG[~same_GG]
    parts = [f"inside a node {_range(inside)}"] if inside.size else []
    if between.size:
        parts.append(f"between nodes {_range(between)}")
        mean_N = _mean_to_others(topology, bandwidth_GG)
        slowest = np.flatnonzero(mean_N < 0.98 * np.median(mean_N))
        if slowest.size:
            parts.append(f"node {slowest[mean_N[slowest].argmin()]} is the slowest")
    return f"Two GPUs alone reach {', '.join(parts)}"


def _range(bandwidth: np.ndarray) -> str:
    low, high = float(bandwidth.min()), float(bandwidth.max())
    return f"{high:.3g} GB/s" if low > 0.995 * high else f"{low:.3g} to {high:.3g} GB/s"


def _mean_to_others(topology: Topology, bandwidth_GG: np.ndarray) -> np.ndarray:
    """float64 [N]: mean over pairs with one rank in the node and one outside, both ways; NaN where there is no other node."""
    node_G = topology.node_of_rank
    other_GG = node_G[:, None] != node_G
    result = np.full(topology.num_nodes, np.nan)
    for node in range(topology.num_nodes if other_GG.any() else 0):
        touches_G = node_G == node
        result[node] = bandwidth_GG[other_GG & (touches_G[:, None] | touches_G)].mean()
    return result


def _table(topology: Topology, routes: Routes, bandwidth_GG: np.ndarray) -> Table:
    node_G, mean_N = topology.node_of_rank, _mean_to_others(topology, bandwidth_GG)
    rows = []
    for node in range(topology.num_nodes):
        ranks = np.flatnonzero(node_G == node)
        inside = bandwidth_GG[np.ix_(ranks, ranks)]
        inside = inside[np.isfinite(inside)]
        others = "–" if np.isnan(mean_N[node]) else f"{mean_N[node]:.3g}"
        rows.append(
            [str(node), str(ranks.size), f"{inside.mean():.3g}" if inside.size else "–", others, f"{routes.latency_us[ranks].max():.3g}"]
        )
    headers = ["node", "GPUs", "inside, GB/s", "with other nodes, GB/s", "longest latency, µs"]
    return Table(headers, rows, "Mean bandwidth of the pairs of each node, and its longest latency")
