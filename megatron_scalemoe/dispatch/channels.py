"""What the rows of a dispatch group travel through. All ranks of the group choose together, once; what they open stays for the process."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import rank_text
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.ragged import gather_objects
from megatron_scalemoe.ops.transports.cuda import DTYPES, MAX_EXPERTS_PER_TOKEN, MAX_RANKS, WORD_BYTES, Limits
from megatron_scalemoe.ops.transports.cuda_memory import CudaUnavailable, open_cuda
from megatron_scalemoe.ops.transports.registry import register
from megatron_scalemoe.ops.transports.shm import open_shm
from megatron_scalemoe.ops.transports.shm_memory import ShmUnavailable

_NATIVE = {"cpu": "shm", "cuda": "cuda"}  # by the type of the ranks' device
# Emulation cannot show that they are right on a real GPU, so nobody gets them unasked.
_UNTRIED = "the CUDA kernels have not been tried on a GPU yet (--scalemoe-transport cuda takes them)"
_MEDIUM = {"shm": "shared memory", "cuda": "CUDA kernels"}


@dataclasses.dataclass(frozen=True, eq=False)
class Peers:
    """The ranks that dispatch among each other, as one of them sees it.

    group: theirs. device: this rank's. host: the same text on ranks that can share memory. timeout: when a rank that does not come hangs.
    """

    group: dist.ProcessGroup
    device: torch.device
    host: str
    timeout: datetime.timedelta


@dataclasses.dataclass(frozen=True)
class DispatchSizes:
    """A dispatch as this rank calls it. CUDA transports are opened for the most tokens of all ranks, and can do no more later.

    num_experts, max_experts_per_token, expert_tp_size: as for `RaggedDispatcher`. varying: the number of tokens may grow.
    """

    num_experts: int
    max_experts_per_token: int
    expert_tp_size: int
    tokens: int
    hidden: int
    dtype: torch.dtype
    varying: bool = False

    @property
    def columns(self) -> int:
        """(expert, shard) pairs that a token has at most."""
        return self.max_experts_per_token * self.expert_tp_size

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Channel:
    """What a dispatch group has opened: `collective`, `shm` or `cuda`.

    transport: its number in `ops.transports.registry`, None for collectives; it is of this host's ranks. between: the ranks with this
    rank's position in their hosts, in the order of the hosts; None on one host.
    """

    name: str
    transport: int | None = None
    between: dist.ProcessGroup | None = None


@dataclasses.dataclass(frozen=True)
class HostLayout:
    """A native transport among the `ranks_per_host` ranks of each of `num_hosts` hosts; or, with `why_not`, none.

    lacks: ranks have no native library, which is the user's to change.
    """

    num_hosts: int = 1
    ranks_per_host: int = 1
    why_not: str | None = None
    lacks: bool = False


_COLLECTIVE = Channel("collective")
_layouts: dict[dist.ProcessGroup, HostLayout] = {}
_channels: dict[dist.ProcessGroup, Channel] = {}


def check_transport(peers: Peers, asked: str) -> None:
    """Raises `ScaleMoEError` on all ranks of a dispatch group if --scalemoe-transport `asked` is for another device, or a rank has not
    the native library that it needs. Collective over the group at the first call.
    """
    device = peers.device.type
    if asked not in ("auto", "collective", _NATIVE[device]):
        raise ScaleMoEError(
            f"--scalemoe-transport {asked} is for ranks on the {'CPU' if asked == 'shm' else 'GPU'}",
            found=f"ranks on the {'CPU' if device == 'cpu' else 'GPU'}",
            try_=f"--scalemoe-transport auto, or {_NATIVE[device]}",
        )
    if asked != "collective" and (layout := _layout(peers)).lacks and asked != "auto":
        raise ScaleMoEError(
            f"--scalemoe-transport {asked} needs our native library on every rank",
            found=layout.why_not,
            try_="mend that, or --scalemoe-transport auto, which then takes collectives",
        )


def channel_of(peers: Peers, asked: str, sizes: DispatchSizes, max_rows_factor: float | None = None) -> Channel:
    """The channel of a dispatch group. Collective over the group at the first call, which opens it; its first rank says what, and why.

    max_rows_factor: as in `ScaleMoEConfig`. Whatever is in the way of a native transport leads to collectives, but for what
    `check_transport` raises.
    """
    if asked == "collective":
        return _COLLECTIVE
    if peers.group not in _channels:
        layout = _layout(peers)
        untried = asked == "auto" and peers.device.type == "cuda"
        why_not = layout.why_not or (_UNTRIED if untried else None)
        channel, why_not = (_COLLECTIVE, why_not) if why_not else _open(peers, layout, sizes, max_rows_factor)
        _channels[peers.group] = channel
        if peers.group.rank() == 0:
            how = f"by collectives: {why_not}" if why_not else f"through {_MEDIUM[channel.name]}{_where(layout)}"
            print(f" scalemoe: {rank_text(dist.get_process_group_ranks(peers.group))} dispatch {how}", flush=True)
    return _channels[peers.group]


def layout_of(ranks_G: Sequence[int], hosts_G: Sequence[str], lacks_G: Sequence[str | None]) -> HostLayout:
    """What the ranks of a group can have, from each one's host and why it has no native library, if so; in group order."""
    lacking = [rank for rank, lacks in zip(ranks_G, lacks_G, strict=True) if lacks]
    if lacking:
        return HostLayout(why_not=f"no native library on {rank_text(lacking)}: {next(filter(None, lacks_G))}", lacks=True)
    hosts = list(dict.fromkeys(hosts_G))
    if len(hosts) == len(hosts_G):
        return HostLayout(why_not="no two of the ranks share a host")
    ranks_per_host = len(hosts_G) // len(hosts)
    if list(hosts_G) != [host for host in hosts for _ in range(ranks_per_host)]:
        return HostLayout(why_not=f"{len(hosts)} hosts do not have equally many of the ranks, host by host")
    return HostLayout(len(hosts), ranks_per_host)


def limits_of(sizes: DispatchSizes, most_tokens: int, layout: HostLayout, max_rows_factor: float | None) -> Limits:
    """What a CUDA transport of one host's ranks must have room for. Each of them may get the tokens of all ranks with its position."""
    max_rows = None if max_rows_factor is None else math.ceil(max_rows_factor * most_tokens * sizes.columns)
    return Limits(max(1, most_tokens * layout.num_hosts), sizes.columns, sizes.row_bytes, max_rows)


def why_not_cuda(sizes: DispatchSizes, layout: HostLayout) -> str | None:
    """What keeps the CUDA kernels from such dispatches; the same on all ranks."""
    limits = (
        (sizes.dtype in DTYPES, f"the CUDA kernels do not take {sizes.dtype}"),
        (sizes.row_bytes % WORD_BYTES == 0, f"the CUDA kernels take rows of a multiple of {WORD_BYTES} bytes, not of {sizes.row_bytes}"),
        (sizes.columns <= MAX_EXPERTS_PER_TOKEN, f"the CUDA kernels take at most {MAX_EXPERTS_PER_TOKEN} experts per token"),
        (layout.ranks_per_host <= MAX_RANKS, f"the CUDA kernels take at most {MAX_RANKS} ranks of a host"),
        (not sizes.varying, "the CUDA kernels need room for a number of tokens that is known, which varies with --variable-seq-lengths"),
    )
    return next((problem for fits, problem in limits if not fits), None)


def _layout(peers: Peers) -> HostLayout:
    if peers.group not in _layouts:
        hosts_G, lacks_G = zip(*gather_objects((peers.host, native.why_not(peers.device.type)), peers.group), strict=True)
        _layouts[peers.group] = layout_of(dist.get_process_group_ranks(peers.group), hosts_G, lacks_G)
    return _layouts[peers.group]


def _open(peers: Peers, layout: HostLayout, sizes: DispatchSizes, max_rows_factor: float | None) -> tuple[Channel, str | None]:
    """The channel, or collectives and the reason; one rank's failure is enough for that."""
    on_cuda = peers.device.type == "cuda"
    if on_cuda and (problem := why_not_cuda(sizes, layout)):
        return _COLLECTIVE, problem
    inside, between = _host_groups(peers, layout)
    transport, why_not = None, None
    try:
        if on_cuda:
            most_tokens = max(gather_objects(sizes.tokens, peers.group))
            transport = open_cuda(inside, limits_of(sizes, most_tokens, layout, max_rows_factor), peers.timeout.total_seconds())
        else:
            transport = open_shm(inside, peers.timeout.total_seconds())
    except (ShmUnavailable, CudaUnavailable) as error:
        why_not = ": ".join(line.strip().removeprefix("found: ") for line in str(error).splitlines())
    reasons = [reason for reason in gather_objects(why_not, peers.group) if reason]
    if not reasons:
        return Channel(transport.name, register(transport), between), None
    if transport is not None:
        transport.close()
    return _COLLECTIVE, reasons[0]


def _host_groups(peers: Peers, layout: HostLayout) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """This host's ranks, and the ranks with this one's position in their hosts."""
    if layout.num_hosts == 1:
        return peers.group, None
    ranks_HP = torch.tensor(dist.get_process_group_ranks(peers.group)).view(layout.num_hosts, layout.ranks_per_host)
    host, position = divmod(peers.group.rank(), layout.ranks_per_host)
    # Only the members make them: the ranks of other dispatch groups, as of other pipeline stages, may be elsewhere.
    options = {"timeout": peers.timeout, "use_local_synchronization": True}
    _level_group_counts(peers.group)
    inside = dist.new_group(ranks_HP[host].tolist(), **options)
    return inside, dist.new_group(ranks_HP[:, position].tolist(), **options)


def _level_group_counts(group: dist.ProcessGroup) -> None:
    """torch names such a group by how many groups the rank has; members with different names would wait for each other for ever."""
    own = len(dist.distributed_c10d._world.pg_names)
    for _ in range(max(gather_objects(own, group)) - own):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _where(layout: HostLayout) -> str:
    return ": they share a host" if layout.num_hosts == 1 else f" inside each of {layout.num_hosts} hosts, by collectives between them"
