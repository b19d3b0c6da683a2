"""What the rows of a dispatch group travel through. All ranks of the group choose together, once; what they open stays for the process."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import rank_text
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.transports.cuda import DTYPES, MAX_EXPERTS_PER_TOKEN, MAX_RANKS, WORD_BYTES, Limits
from megatron_scalemoe.ops.transports.cuda_memory import CudaUnavailable, open_cuda
from megatron_scalemoe.ops.transports.registry import Transport, register
from megatron_scalemoe.ops.transports.shm import BOOT_ID, PID_NAMESPACE, ShmUnavailable, open_shm

_NATIVE = {"cpu": "shm", "cuda": "cuda"}  # by the type of the ranks' device
# Emulation cannot show that they are right on a real GPU, so nobody gets them unasked.
_UNTRIED = "the CUDA kernels have not been tried on a GPU yet (--scalemoe-transport cuda takes them)"
_MEDIUM = {"shm": "shared memory", "cuda": "CUDA kernels"}


@dataclasses.dataclass(frozen=True)
class RankFacts:
    """What a rank tells the others. host: the same text on ranks that can share memory. lacks: why it has no native library, if so."""

    rank: int
    host: str
    lacks: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A native transport among the `ranks_per_host` ranks of each of `num_hosts` hosts; or, with `why_not`, none.

    lacks: ranks have no native library, which is the user's to change.
    """

    num_hosts: int = 1
    ranks_per_host: int = 1
    why_not: str | None = None
    lacks: bool = False


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """A dispatch as this rank calls it. CUDA transports are opened for the largest of all ranks, and can do no larger one later.

    columns: (expert, shard) pairs that a token has at most. varying: the number of tokens may grow. max_rows_factor: as in
    `ScaleMoEConfig`.
    """

    tokens: int
    hidden: int
    dtype: torch.dtype
    columns: int
    varying: bool = False
    max_rows_factor: float | None = None

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Channel:
    """What a dispatch group has opened: `collective`, `shm` or `cuda`.

    transport: its number in `ops.transport`, None for collectives; it is of this host's ranks. between: the ranks with this rank's position
    in their hosts, in the order of the hosts; None on one host.
    """

    name: str
    transport: int | None = None
    between: dist.ProcessGroup | None = None


_COLLECTIVE = Channel("collective")
_plans: dict[dist.ProcessGroup, Plan] = {}
_channels: dict[dist.ProcessGroup, Channel] = {}


def check_transport(group: dist.ProcessGroup, asked: str) -> None:
    """Raises `ScaleMoEError` on all ranks of a dispatch group if --scalemoe-transport `asked` is for another device, or a rank has not
    the native library that it needs. Collective over the group at the first call.
    """
    device = _device().type
    if asked not in ("auto", "collective", _NATIVE[device]):
        raise ScaleMoEError(
            f"--scalemoe-transport {asked} is for ranks on the {'CPU' if asked == 'shm' else 'GPU'}",
            found=f"ranks on the {'CPU' if device == 'cpu' else 'GPU'}",
            try_=f"--scalemoe-transport auto, or {_NATIVE[device]}",
        )
    if asked != "collective" and (plan := _plan(group)).lacks and asked != "auto":
        raise ScaleMoEError(
            f"--scalemoe-transport {asked} needs our native library on every rank",
            found=plan.why_not,
            try_="mend that, or --scalemoe-transport auto, which then takes collectives",
        )


def channel_of(group: dist.ProcessGroup, asked: str, sizes: CallSizes) -> Channel:
    """The channel of a dispatch group. Collective over the group at the first call, which opens it; its first rank says what, and why.

    Whatever is in the way of a native transport leads to collectives, but for what `check_transport` raises.
    """
    if asked == "collective":
        return _COLLECTIVE
    if group not in _channels:
        plan = _plan(group)
        untried = asked == "auto" and _device().type == "cuda"
        why_not = plan.why_not or (_UNTRIED if untried else None)
        channel, why_not = (_COLLECTIVE, why_not) if why_not else _open(group, plan, sizes)
        _channels[group] = channel
        if group.rank() == 0:
            how = f"by collectives: {why_not}" if why_not else f"through {_MEDIUM[channel.name]}{_where(plan)}"
            print(f" scalemoe: {rank_text(dist.get_process_group_ranks(group))} dispatch {how}", flush=True)
    return _channels[group]


def plan_of(facts_G: Sequence[RankFacts]) -> Plan:
    """What the ranks of a group can have, from the facts of all of them in group order."""
    lacking = [facts.rank for facts in facts_G if facts.lacks]
    if lacking:
        reason = next(facts.lacks for facts in facts_G if facts.lacks)
        return Plan(why_not=f"no native library on {rank_text(lacking)}: {reason}", lacks=True)
    hosts = list(dict.fromkeys(facts.host for facts in facts_G))
    if len(hosts) == len(facts_G):
        return Plan(why_not="no two of the ranks share a host")
    ranks_per_host = len(facts_G) // len(hosts)
    if [facts.host for facts in facts_G] != [host for host in hosts for _ in range(ranks_per_host)]:
        return Plan(why_not=f"{len(hosts)} hosts do not have equally many of the ranks, host by host")
    return Plan(len(hosts), ranks_per_host)


def limits_of(sizes_G: Sequence[CallSizes], plan: Plan) -> Limits:
    """What a CUDA transport of one host's ranks must have room for. Each of them may get the tokens of all ranks with its position."""
    tokens, any_rank = max(sizes.tokens for sizes in sizes_G), sizes_G[0]
    factor = any_rank.max_rows_factor
    max_rows = None if factor is None else math.ceil(factor * tokens * any_rank.columns)
    return Limits(max(1, tokens * plan.num_hosts), any_rank.columns, any_rank.row_bytes, max_rows)


def why_not_cuda(sizes: CallSizes, plan: Plan) -> str | None:
    """What keeps the CUDA kernels from such dispatches; the same on all ranks."""
    limits = (
        (sizes.dtype in DTYPES, f"the CUDA kernels do not take {sizes.dtype}"),
        (sizes.row_bytes % WORD_BYTES == 0, f"the CUDA kernels take rows of a multiple of {WORD_BYTES} bytes, not of {sizes.row_bytes}"),
        (sizes.columns <= MAX_EXPERTS_PER_TOKEN, f"the CUDA kernels take at most {MAX_EXPERTS_PER_TOKEN} experts per token"),
        (plan.ranks_per_host <= MAX_RANKS, f"the CUDA kernels take at most {MAX_RANKS} ranks of a host"),
        (not sizes.varying, "the CUDA kernels need room for a number of tokens that is known, which varies with --variable-seq-lengths"),
    )
    return next((problem for fits, problem in limits if not fits), None)


def _plan(group: dist.ProcessGroup) -> Plan:
    if group not in _plans:
        _plans[group] = plan_of(_gathered(group, RankFacts(dist.get_rank(), _host(), native.why_not(_device().type))))
    return _plans[group]


def _open(group: dist.ProcessGroup, plan: Plan, sizes: CallSizes) -> tuple[Channel, str | None]:
    """The channel, or collectives and the reason; one rank's failure is enough for that."""
    problem = why_not_cuda(sizes, plan) if _device().type == "cuda" else None
    if problem:
        return _COLLECTIVE, problem
    limits = limits_of(_gathered(group, sizes), plan)
    inside, between = _host_groups(group, plan)
    transport, why_not = None, None
    try:
        transport = _open_native(inside, limits)
    except (ShmUnavailable, CudaUnavailable) as error:
        why_not = ": ".join(line.strip().removeprefix("found: ") for line in str(error).splitlines())
    reasons = [reason for reason in _gathered(group, why_not) if reason]
    if not reasons:
        return Channel(transport.name, register(transport), between), None
    if transport is not None:
        transport.close()
    return _COLLECTIVE, reasons[0]


def _open_native(group: dist.ProcessGroup, limits: Limits) -> Transport:
    timeout_s = _timeout(group).total_seconds()
    return open_shm(group, timeout_s) if _device().type == "cpu" else open_cuda(group, limits, timeout_s)


def _host_groups(group: dist.ProcessGroup, plan: Plan) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """This host's ranks, and the ranks with this one's position in their hosts."""
    if plan.num_hosts == 1:
        return group, None
    ranks_HP = torch.tensor(dist.get_process_group_ranks(group)).view(plan.num_hosts, plan.ranks_per_host)
    host, position = divmod(group.rank(), plan.ranks_per_host)
    # Only the members make them: the ranks of other dispatch groups, as of other pipeline stages, may be elsewhere.
    options = {"timeout": _timeout(group), "use_local_synchronization": True}
    _level_group_counts(group)
    inside = dist.new_group(ranks_HP[host].tolist(), **options)
    return inside, dist.new_group(ranks_HP[:, position].tolist(), **options)


def _level_group_counts(group: dist.ProcessGroup) -> None:
    """torch names such a group by how many groups the rank has; members with different names would wait for each other for ever."""
    own = len(dist.distributed_c10d._world.pg_names)
    for _ in range(max(_gathered(group, own)) - own):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _where(plan: Plan) -> str:
    return ": they share a host" if plan.num_hosts == 1 else f" inside each of {plan.num_hosts} hosts, by collectives between them"


def _gathered(group: dist.ProcessGroup, value: object) -> list:
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def _host() -> str:
    """Ranks can map each other's memory if they run under the same kernel and see each other's processes."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(PID_NAMESPACE)}"
    except OSError:
        return platform.node()


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long the group's collectives wait."""
    return group._get_backend(_device()).options._timeout
