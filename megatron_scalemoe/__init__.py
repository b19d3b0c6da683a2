"""ScaleMoE for Megatron-Core: adaptive all-to-all, expert replicas and topology-aware placement, with the same loss.

Public names are imported on first use, so `import megatron_scalemoe` needs neither torch nor megatron.
"""

import importlib

from megatron_scalemoe.version import __version__

_PUBLIC = {
    "ScaleMoEConfig": "config",
    "ScaleMoEError": "errors",
    "use_scalemoe": "mcore.specs",
    "add_scalemoe_args": "mcore.arguments",
    "scalemoe_config_from_args": "mcore.arguments",
    "RaggedDispatcher": "dispatch.ragged",
    "PaddedDispatcher": "dispatch.padded",
    "LocalDispatcher": "dispatch.local",
    "PlacementPlan": "plan.placement_plan",
    "load_plan": "plan.placement_plan",
    "save_plan": "plan.placement_plan",
    "split_tokens": "plan.split",
    "load_topology": "topology.topology_file",
    "compute_routes": "topology.routes",
    "ports_of": "topology.ports",
    "RoutingTrace": "traffic.trace",
    "load_trace": "traffic.trace",
    "CostModel": "cost.model",
    "Links": "cost.network",
    "plan_cost": "cost.plan",
    "PlanRequest": "placement.plan_trace",
    "plan_trace": "placement.plan_trace",
    "plan_placement": "placement.plan_placement",
    "solve_trace": "placement.solve",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted(__all__)
