"""Small topologies that the tests share: one or more of every builder, and random ones."""

import numpy as np

from megatron_scalemoe.topology.builders import BUILDERS, build_topology
from megatron_scalemoe.topology.graph import Override, Topology

PARAMETERS = {
    "dgx_a100": {},
    "dgx_h100": {},
    "nvl72": {"racks": 2, "gpus_per_rack": 6},
    "rail_optimized": {"nodes": 5, "gpus_per_node": 3, "nodes_per_leaf": 2, "spines": 3},
    "fat_tree": {"nodes": 5, "gpus_per_node": 3, "nodes_per_leaf": 2, "spines": 3, "oversubscription": 2.0},
    "dragonfly": {"groups": 3, "routers_per_group": 3, "gpus_per_node": 2},
    "torus": {"dims": (3, 4), "gpus_per_node": 4},
    "ring": {"gpus": 7, "gpus_per_node": 3},
    "fully_connected": {"gpus": 6, "gpus_per_node": 3},
    "pcie_box": {"gpu": "a6000", "nodes": 2},
    "p4d": {"nodes": 3},
}
SMALL = {name: build_topology(name, parameters) for name, parameters in PARAMETERS.items()}
SMALL["torus_3d"] = BUILDERS["torus"](dims=(2, 3, 2))
SMALL["pcie_box_2080ti"] = BUILDERS["pcie_box"](gpu="2080ti", nodes=3)
SMALL["throttled"] = SMALL["rail_optimized"].overridden(Override("node3", scale=0.5), Override("node0/gpu1", bandwidth_GBps=3.0))


def random_topology(seed: int) -> Topology:
    """GPUs of up to three nodes, hung on switches in a random connected graph, with few different latencies so that routes tie. Links of
    one direction only, and links from GPU to GPU, occur."""
    rng = np.random.default_rng(seed)
    switches = [f"s{i}" for i in range(rng.integers(1, 6))]
    node_of_gpu = np.sort(rng.integers(0, 3, rng.integers(2, 8)))
    node_of_gpu = np.unique(node_of_gpu, return_inverse=True)[1]
    gpus = [f"g{i}" for i in range(node_of_gpu.size)]
    vertices = [(s, "switch", [None, 0, 1][rng.integers(3)]) for s in switches]
    vertices += [(g, "gpu", int(n)) for g, n in zip(gpus, node_of_gpu, strict=True)]
    pairs = {(a, b) for i, a in enumerate(switches[1:]) for b in [switches[rng.integers(i + 1)]]}
    pairs |= {(g, switches[rng.integers(len(switches))]) for g in gpus}
    pairs |= {(b, a) for a, b in pairs}
    names = switches + gpus
    extra = rng.integers(0, len(names), (rng.integers(0, 12), 2))
    pairs |= {(names[a], names[b]) for a, b in extra if a != b}
    return Topology.build("random", vertices, [(a, b, float(rng.uniform(1, 9)), float(rng.integers(0, 3))) for a, b in sorted(pairs)])
