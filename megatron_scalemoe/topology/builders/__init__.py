"""Builders of topologies, by name. All parameters are keywords with defaults; their figures are cited beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders.fabrics import dragonfly, fat_tree, rail_optimized
from megatron_scalemoe.topology.builders.machines import dgx_a100, dgx_h100, nvl72, p4d, pcie_box
from megatron_scalemoe.topology.builders.meshes import fully_connected, ring, torus
from megatron_scalemoe.topology.graph import Topology

_FUNCTIONS = (dgx_a100, dgx_h100, nvl72, rail_optimized, fat_tree, dragonfly, torus, ring, fully_connected, pcie_box, p4d)
BUILDERS: dict[str, Callable[..., Topology]] = {function.__name__: function for function in _FUNCTIONS}


def build_topology(builder: str, parameters: Mapping[str, object]) -> Topology:
    """The topology of a named builder. Raises `ScaleMoEError` on an unknown name or a bad parameter."""
    if builder not in BUILDERS:
        raise ScaleMoEError(f"must be one of {', '.join(BUILDERS)}", field=("builder",), found=repr(builder))
    return BUILDERS[builder](**parameters)
