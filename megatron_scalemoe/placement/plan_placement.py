"""`plan_placement`: from counts alone to a plan, for programs that have no trace file. In the shape of EPLB's `rebalance_experts`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.plan_trace import PlanRequest, plan_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.topology_file import load_topology
from megatron_scalemoe.traffic.rounding import whole_tokens
from megatron_scalemoe.traffic.trace import RoutingTrace
from megatron_scalemoe.typed import nearest


def plan_placement(
    counts: np.ndarray, topology: Topology | str | os.PathLike, *, replicas: int = 0, topk: int = 1, **options: object
) -> PlacementPlan:
    """Where experts and their replicas should live.

    counts: (token, expert) selections of one micro-batch, [L, E] of all ranks (each sends its share), [L, G, E] from each of the G ranks,
    or [S, L, G, E] of single steps; anything that numpy takes. topology: of G ranks, or its file. replicas: copies per layer at most, over
    all ranks. topk: experts per token. options: as for `PlanRequest`. Raises `ScaleMoEError` where they do not fit.

    The plan's `physical_to_logical` [L, P], `logical_to_physical` [L, E, most copies] and `num_copies` [L, E] are EPLB's `phy2log`,
    `log2phy` and `logcnt`; a slot without an expert, and a copy that there is not, are -1.
    """
    cluster = topology if isinstance(topology, Topology) else load_topology(Path(topology))
    counts = np.asarray(counts)
    if counts.ndim not in (2, 3, 4) or counts.dtype.kind not in "iuf":
        problem = "counts must be numbers [layers, experts], [layers, ranks, experts] or [steps, layers, ranks, experts]"
        raise ScaleMoEError(problem, found=f"{counts.dtype} {counts.shape}")
    if counts.ndim == 2:
        counts = np.repeat(counts[:, None] / cluster.num_ranks, cluster.num_ranks, axis=1)
    if counts.ndim == 3:
        counts = counts[None]
    if counts.dtype.kind == "f":
        if not (np.isfinite(counts).all() and counts.max(initial=0) < 2**31):
            raise ScaleMoEError("counts must be finite numbers of tokens")
        counts = whole_tokens(counts)
    known = [field.name for field in dataclasses.fields(PlanRequest) if field.name not in ("trace", "topology", "replicas")]
    if unknown := sorted(options.keys() - set(known)):
        raise ScaleMoEError(f"{unknown[0]!r} is no option", try_=nearest(unknown[0], known))
    return plan_trace(PlanRequest(trace=RoutingTrace(counts, None, {"topk": topk}), topology=cluster, replicas=replicas, **options)).plan
