"""What the planner must know of this job: the ports of an expert-parallel group, and how long experts take for a row."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.balance.model import Experts, MoESizes
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.ports import Ports, ports_of, two_level_ports
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.topology.topology_file import load_topology

_ROWS, _MOST_OPERATIONS = 4096, 2e10
_PROBE_BYTES = 4 << 20
_REPEATS = 5


def group_ports(topology_path: str | None, groups: Groups) -> Ports:
    """The ports of the first expert-parallel group of this pipeline stage: of the topology in the file, or measured. Collective.

    The file must have a GPU for each rank of the job, or of one expert-parallel group. Measured is one all-to-all, and every rank taken for
    equally near. Raises `ScaleMoEError` if the file does not fit.
    """
    ep, world = groups.ep.size(), groups.world.size()
    if topology_path is None:
        return two_level_ports(1, ep, scale_up_GBps=_measured_bandwidth_GBps(groups))
    topology = load_topology(Path(topology_path))
    first = [dist.get_process_group_ranks(groups.ep)]
    dist.broadcast_object_list(first, group_src=0, group=groups.stage)
    if topology.num_ranks not in (ep, world):
        expected = f"{world}, for each rank of the job, or {ep}, for an expert-parallel group"
        raise ScaleMoEError(f"--scalemoe-topology {topology_path} must have as many GPUs: {expected}", found=topology.num_ranks)
    ports = ports_of(topology, compute_routes(topology))
    return ports if topology.num_ranks == ep else ports.subset(first[0])


def measured_cost(sizes: MoESizes, experts: Experts, micro_batches: int, stage: dist.ProcessGroup) -> CostModel:
    """The cost model of this model's MoE layers, with the speed of the experts measured on all ranks of the stage at once. Collective."""
    cost = CostModel(
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        gated=sizes.gated,
        bytes_per_value=sizes.dtype.itemsize,
        micro_batches=micro_batches,
    )
    rows = int(min(_ROWS, _MOST_OPERATIONS / (6 * cost.expert_parameters)))
    rows_per_expert = max(1, rows // experts.num_local_experts)
    us_per_row = _experts_us(experts, rows_per_expert) / (rows_per_expert * experts.num_local_experts)
    return cost.replaced(gpu_TFLOPs=6 * cost.expert_parameters / (_mean_over_ranks(us_per_row, stage) * 1e6))


def _experts_us(experts: Experts, rows_per_expert: int) -> float:
    """Forward and backward of so many rows; nothing is left in the parameters' gradients."""
    rows = rows_per_expert * experts.num_local_experts
    like = {"dtype": experts.fc1.dtype, "device": experts.fc1.device}
    x_RD = torch.ones(rows, experts.fc1.shape[2], **like).requires_grad_()
    counts_L = torch.full((experts.num_local_experts,), rows_per_expert)
    probs_R = torch.ones(rows, device=like["device"])
    times_us = []
    for _ in range(_REPEATS):
        _synchronize()
        began = time.perf_counter()
        y_RD = experts.compute(x_RD, counts_L, probs_R, experts.fc1, experts.fc2)
        torch.autograd.grad(y_RD, (x_RD, experts.fc1, experts.fc2), torch.ones_like(y_RD))
        _synchronize()
        times_us.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times_us)


def _measured_bandwidth_GBps(groups: Groups) -> float:
    """What each rank sends to the others in an all-to-all, 10^9 bytes a second."""
    group = groups.ep
    sent = torch.zeros(_PROBE_BYTES // group.size() * group.size(), dtype=torch.uint8, device=torch.cuda.current_device())
    received, times_s = torch.empty_like(sent), []
    for _ in range(_REPEATS):
        dist.barrier(group)
        _synchronize()
        began = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        _synchronize()
        times_s.append(time.perf_counter() - began)
    leaves = sent.numel() * (group.size() - 1) / group.size()
    return leaves / _mean_over_ranks(statistics.median(times_s), groups.stage) / 1e9


def _mean_over_ranks(value: float, stage: dist.ProcessGroup) -> float:
    """Of the pipeline stage, so that its ranks agree."""
    total = torch.tensor([value], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=stage)
    return float(total) / stage.size()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
