import dataclasses

import pytest

from megatron_scalemoe.cost.bottleneck import bottleneck
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.graph import Override
from tests.cost.cluster import equal_nodes, star_cluster
from tests.simulate.test_engine import small_trace


@pytest.mark.parametrize(
    ("scale", "cost", "kind"),
    [(1e-3, {}, "link"), (1.0, {"gpu_TFLOPs": 1e-3}, "compute"), (1.0, {"exchange_overhead_us": 1e9}, "overhead")],
)
def test_what_is_slow_is_named(scale, cost, kind):
    topology = star_cluster(equal_nodes(2, 2))
    slow = topology.links[0]
    links = Links(topology.overridden(Override("->".join(slow), scale=scale)))
    trace = small_trace()
    layers = plan_cost(PlacementPlan.contiguous(trace.num_layers, 4, trace.num_experts), trace, links, CostModel(**cost)).layers
    found = bottleneck(layers, links)
    assert found.kind == kind
    assert found.layer_us == max(layer.total_us for layer in layers)
    assert 0 < found.busy_us <= found.layer_us
    if kind == "link":
        assert found.what == "->".join(slow)
    if kind == "compute":
        assert found.what == f"rank {layers[found.layer].load_G.argmax()}"
    heavy = [dataclasses.replace(layer, replica_us=1e12) for layer in layers]
    assert bottleneck(heavy, links).kind == "replicas"
