"""A small cluster of our own for the cost tests: an NVSwitch per node, a NIC per GPU, one fabric switch; every path is unique."""

from collections.abc import Sequence

import numpy as np

from megatron_scalemoe.topology.graph import Topology


def star_cluster(gpus: Sequence[tuple[int, int]], *, seed: int | None = None, scale_up_GBps=400.0, scale_out_GBps=50.0) -> Topology:
    """gpus: (machine, local number) of each rank, in rank order; nodes are numbered in the order in which their machines appear.

    With `seed`, each link's bandwidth and latency is random, but the same for the same machine and GPU, whatever the ranks' order.
    """
    vertices: list[tuple] = [("fabric", "switch", None)]
    links: list[tuple] = []

    def connect(a: str, b: str, bandwidth_GBps: float, latency_us: float, identity: tuple[int, ...]) -> None:
        for direction, (u, v) in enumerate(((a, b), (b, a))):
            bandwidth, latency = bandwidth_GBps, latency_us
            if seed is not None:
                rng = np.random.default_rng([seed, direction, *identity])
                bandwidth, latency = bandwidth_GBps * rng.uniform(0.2, 1), latency_us * rng.integers(1, 9)
            links.append((u, v, bandwidth, latency))

    machines = list(dict.fromkeys(machine for machine, _ in gpus))
    for node, machine in enumerate(machines):
        vertices.append((f"switch{machine}", "switch", node))
    for machine, local in gpus:
        node = machines.index(machine)
        gpu, nic = f"gpu{machine}.{local}", f"nic{machine}.{local}"
        vertices += [(gpu, "gpu", node), (nic, "nic", node)]
        connect(gpu, f"switch{machine}", scale_up_GBps, 0.5, (0, machine, local))
        connect(gpu, nic, 2 * scale_out_GBps, 0.5, (1, machine, local))
        connect(nic, "fabric", scale_out_GBps, 2.0, (2, machine, local))
    return Topology.build("star", vertices, links)


def equal_nodes(nodes: int, per_node: int) -> list[tuple[int, int]]:
    return [(node, gpu) for node in range(nodes) for gpu in range(per_node)]
