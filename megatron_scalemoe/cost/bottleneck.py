"""What sets the time of a layer: a link, a rank's experts, the replicas, or what every exchange costs however little it carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_scalemoe.cost.layer import LayerCost
from megatron_scalemoe.cost.network import Links

# Dispatch and combine load opposite directions of a link, so that each has half of the time that links take.
_LINK_SHARE = 0.25


class Bottleneck(NamedTuple):
    """Of the costliest layer: what is busy longest, for `busy_us` of `layer_us`. kind: link, compute, replicas or overhead."""

    layer: int
    kind: str
    what: str
    busy_us: float
    layer_us: float

    def __str__(self) -> str:
        verb = {"link": "carries", "compute": "computes"}.get(self.kind, "takes")
        return (
            f"Bottleneck: in layer {self.layer}, the slowest, {self.what} {verb} {self.busy_us / 1e3:.3f} of {self.layer_us / 1e3:.3f} ms."
        )


def bottleneck(layers: Sequence[LayerCost], links: Links) -> Bottleneck:
    """Of the costliest of `layers`, which were priced on `links`."""
    layer = max(range(len(layers)), key=lambda i: layers[i].total_us)
    cost = layers[layer]
    link_us, exchange_us = float(cost.busy_us_X.max(initial=0.0)), cost.dispatch_us + cost.combine_us
    if cost.compute_us >= max(exchange_us, cost.replica_us):
        part = ("compute", f"rank {cost.load_G.argmax()}", cost.compute_us)
    elif cost.replica_us >= exchange_us:
        part = ("replicas", "sending parameters to replicas", cost.replica_us)
    elif link_us >= _LINK_SHARE * exchange_us:
        part = ("link", "->".join(links.topology.links[int(cost.busy_us_X.argmax())]), link_us)
    else:
        part = ("overhead", "latency and fixed overhead of the exchanges", exchange_us - link_us)
    return Bottleneck(layer, *part, cost.total_us)
