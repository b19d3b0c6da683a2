"""Are the ranks on the machines that the plan and the topology were made for? With nodes in another order every price is wrong."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import Vote, rank_text


def check_node_order(of_plan: Sequence[int] | None, of_topology: Sequence[int] | None, groups: Groups) -> None:
    """Raise `ScaleMoEError`, on all ranks of the pipeline stage, unless expert-parallel ranks share machines as plan and topology say.

    of_plan, of_topology: the node of each expert-parallel rank; None if not known. Collective over the pipeline stage.
    """
    hosts: list[str] = [""] * groups.ep.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=groups.ep)
    vote = Vote(groups.stage, torch.cuda.current_device(), "check of nodes")
    vote.attempt(check_nodes, of_plan, of_topology, hosts)
    vote.settle()


def check_nodes(of_plan: Sequence[int] | None, of_topology: Sequence[int] | None, hosts: Sequence[str]) -> None:
    """Raise `ScaleMoEError` unless the same ranks are together in all three that are known.

    Where all ranks are on one machine its name says nothing, and such a job may try out any plan.
    """
    if of_plan is not None and of_topology is not None and _together(of_plan) != _together(of_topology):
        raise ScaleMoEError(
            "--scalemoe-plan and --scalemoe-topology must have the same ranks on a node",
            found=f"{_text(of_plan)} in the plan, {_text(of_topology)} in the topology",
            try_="the topology that the plan was made with, or `scalemoe plan` with this one",
        )
    for flag, nodes in (("--scalemoe-plan", of_plan), ("--scalemoe-topology", of_topology)):
        if nodes is not None and len(set(hosts)) > 1 and _together(nodes) != _together(hosts):
            raise ScaleMoEError(
                f"the nodes of {flag} must hold the same expert-parallel ranks as this job's machines",
                found=f"{_text(nodes)} in the file, {_text(hosts)} in this job",
                try_="start the machines in the order of the file, with as many ranks on each; or make topology and plan for this order",
            )


def _together(labels: Sequence) -> list[list[int]]:
    """The ranks with equal labels, in the order of their first."""
    ranks: dict[object, list[int]] = {}
    for rank, label in enumerate(labels):
        ranks.setdefault(label, []).append(rank)
    return list(ranks.values())


def _text(labels: Sequence) -> str:
    """`ranks 0-3 | ranks 4-7`, of many the first."""
    nodes = _together(labels)
    return " | ".join(map(rank_text, nodes[:4])) + (f" | ... ({len(nodes)} nodes)" if len(nodes) > 4 else "")
