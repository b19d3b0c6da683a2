"""GPUs linked directly to GPUs, without switches: torus, ring, and all to all. In the first two, GPUs forward for each other."""

from __future__ import annotations

import itertools
import math

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders.parts import Parts, builder

# Jouppi et al., "TPU v4", ISCA'23: six inter-chip links of 50 GB/s per direction, four chips per host.
TORUS_LINK_GBps, TORUS_CHIPS_PER_NODE = 50.0, 4
# AMD Instinct MI300X data sheet: seven Infinity Fabric links per GPU, 128 GB/s both directions together.
INFINITY_FABRIC_GBps = 64.0
# One hop between neighbours: 1-2 us is what is published for NVLink; taken for all of these.
DIRECT_HOP_US = 1.0


@builder
def torus(
    *,
    dims: tuple[int, ...] = (4, 4),
    gpus_per_node: int = TORUS_CHIPS_PER_NODE,
    link_GBps: float = TORUS_LINK_GBps,
    hop_us: float = DIRECT_HOP_US,
) -> Parts:
    """2D or 3D torus of TPU v4's kind; ranks in row-major order, `gpus_per_node` consecutive ranks in a node."""
    if len(dims) not in (2, 3) or min(dims) < 2:
        problem = "a torus has two or three dimensions of 2 or more"
        raise ScaleMoEError(problem, field=("parameters", "dims"), found=list(dims), try_="dims 4 4, or dims 4 4 4; ring for one dimension")
    parts = Parts()
    gpus = _gpus(parts, math.prod(dims), gpus_per_node)
    name_of = dict(zip(itertools.product(*map(range, dims)), gpus, strict=True))
    for place, gpu in name_of.items():
        for axis, size in enumerate(dims):
            following = (*place[:axis], (place[axis] + 1) % size, *place[axis + 1 :])
            if size > 2 or place[axis] == 0:  # two in a line: the way around is the same link
                parts.cable(gpu, name_of[following], link_GBps, hop_us)
    return parts


@builder
def ring(*, gpus: int = 8, gpus_per_node: int = 8, link_GBps: float = TORUS_LINK_GBps, hop_us: float = DIRECT_HOP_US) -> Parts:
    """Each GPU linked to the next, the last to the first."""
    parts = Parts()
    names = _gpus(parts, gpus, gpus_per_node)
    for i in range(gpus if gpus > 2 else gpus - 1):
        parts.cable(names[i], names[(i + 1) % gpus], link_GBps, hop_us)
    return parts


@builder
def fully_connected(
    *, gpus: int = 8, gpus_per_node: int = 8, link_GBps: float = INFINITY_FABRIC_GBps, hop_us: float = DIRECT_HOP_US
) -> Parts:
    """A link between each two GPUs, as in a box of eight MI300X."""
    parts = Parts()
    for one, other in itertools.combinations(_gpus(parts, gpus, gpus_per_node), 2):
        parts.cable(one, other, link_GBps, hop_us)
    return parts


def _gpus(parts: Parts, count: int, per_node: int) -> list[str]:
    return [parts.vertex(f"node{i // per_node}/gpu{i % per_node}", "gpu", i // per_node) for i in range(count)]
