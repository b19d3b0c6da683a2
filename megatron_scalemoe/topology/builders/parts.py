"""What the builders share: `Parts` to collect vertices and links, `@builder`, a node with NVSwitch, and figures of common hardware."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.graph import Link, Topology, Vertex

# Enough for 25,000 GPUs; more is a typing error, and would take minutes.
MAX_LINKS = 200_000

# Bandwidths in GB/s, one direction.
# NVIDIA A100 data sheet: third-generation NVLink, 600 GB/s both directions together (12 links x 50).
NVLINK3_GBps = 300.0
# NVIDIA H100 data sheet: fourth generation, 900 GB/s (18 x 50).
NVLINK4_GBps = 450.0
# NVIDIA GB200 NVL72 page: fifth generation, 1.8 TB/s per GPU.
NVLINK5_GBps = 900.0
# PCI-SIG: x16 of generations 3, 4, 5 = 16, 32, 64 GB/s.
PCIE3_GBps, PCIE4_GBps, PCIE5_GBps = 16.0, 32.0, 64.0
# InfiniBand HDR 200 Gb/s (DGX A100: 8 x ConnectX-6), NDR 400 Gb/s (DGX H100: 8 x ConnectX-7).
HDR_GBps, NDR_GBps = 25.0, 50.0
GBIT_IN_GB = 1 / 8

# Latencies in us. Two NVLink hops make the 1 us at the low end of published NVLink figures (1-2 us).
NVLINK_HOP_US = 0.5
# GPU - NIC - switch - NIC - GPU = 2.6 us, the InfiniBand alpha of TACCL's profiles (NSDI'23, examples/topo of its repository).
GPU_TO_NIC_US, SWITCH_HOP_US = 1.0, 0.3


class Parts:
    """Vertices and links of a topology that is being built."""

    def __init__(self) -> None:
        self.vertices: list[Vertex] = []
        self.links: list[Link] = []

    def vertex(self, name: str, kind: str, node: int | None = None) -> str:
        """Adds a vertex and returns its name."""
        self.vertices.append(Vertex(name, kind, node))
        self._check_size()
        return name

    def cable(self, one: str, other: str, bandwidth_GBps: float, latency_us: float) -> None:
        """Adds a link in each direction."""
        self.links += [Link(one, other, bandwidth_GBps, latency_us), Link(other, one, bandwidth_GBps, latency_us)]
        self._check_size()

    def _check_size(self) -> None:
        if max(len(self.vertices), len(self.links)) > MAX_LINKS:
            raise ScaleMoEError(f"the topology would have more than {MAX_LINKS} vertices or links", field=("parameters",))


def nvswitch_node(parts: Parts, node: int, gpus: int, scale_up_GBps: float) -> list[str]:
    """Adds GPUs that talk through NVSwitch, here one vertex: its planes never block each other. Returns the GPUs."""
    switch = parts.vertex(f"node{node}/nvswitch", "switch", node)
    names = [parts.vertex(f"node{node}/gpu{i}", "gpu", node) for i in range(gpus)]
    for name in names:
        parts.cable(name, switch, scale_up_GBps, NVLINK_HOP_US)
    return names


def add_nics(parts: Parts, node: int, gpus: list[str], pcie_GBps: float) -> list[str]:
    """Adds a NIC beside each GPU (GPUDirect RDMA through their PCIe switch). Returns the NICs."""
    nics = [parts.vertex(f"node{node}/nic{i}", "nic", node) for i in range(len(gpus))]
    for gpu, nic in zip(gpus, nics, strict=True):
        parts.cable(gpu, nic, pcie_GBps, GPU_TO_NIC_US)
    return nics


def builder(function: Callable[..., Parts]) -> Callable[..., Topology]:
    """Turns a function that returns `Parts` into one that checks its parameters and returns a `Topology` that knows how it was built.

    Raises `ScaleMoEError` on an unknown parameter, a wrong type, an integer below 1 or a number not above 0.
    """
    signature = inspect.signature(function, eval_str=True)
    name = function.__name__

    @functools.wraps(function)
    def build(**parameters: object) -> Topology:
        for key, value in parameters.items():
            if key not in signature.parameters:
                try_ = f"one of {', '.join(signature.parameters)}" if signature.parameters else "no parameters"
                raise ScaleMoEError(f"{name} has no such parameter", field=("parameters", key), try_=try_)
            _check(key, value, signature.parameters[key].annotation)
        bound = signature.bind(**parameters)
        bound.apply_defaults()
        parts = function(**bound.arguments)
        topology = Topology.build(name, parts.vertices, parts.links)
        return topology.built_by(name, bound.arguments)

    return build


def _check(key: str, value: object, kind: type) -> None:
    field = ("parameters", key)
    if kind is int and not (type(value) is int and value >= 1):
        raise ScaleMoEError("must be an integer, 1 or more", field=field, found=repr(value))
    if kind is float and not (type(value) in (int, float) and 0 < value < 1e300 and math.isfinite(value)):
        raise ScaleMoEError("must be a finite number above 0", field=field, found=repr(value))
    if kind is str and not isinstance(value, str):
        raise ScaleMoEError("must be text", field=field, found=repr(value))
    if kind == tuple[int, ...] and not (isinstance(value, tuple | list) and all(type(v) is int and v >= 1 for v in value)):
        raise ScaleMoEError("must be integers, each 1 or more", field=field, found=repr(value))
