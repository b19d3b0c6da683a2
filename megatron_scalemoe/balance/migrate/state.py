"""All state of a rank's experts as tensors, and one expert of it as one row of bytes.

An expert is its part of the weights fc1 and fc2 and of what Adam keeps for each: the fp32 main copy, if it is not the weight itself, and
the two moments. Adam's step is the same for all experts. A distributed optimizer cuts each parameter over the expert-data-parallel ranks,
anywhere, even in the middle of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import Echo
from megatron_scalemoe.ops.payload import PayloadLayout, payload_layout, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")
_HEADER = (4, torch.int64)  # layer, logical expert, bytes behind the header, their checksum
_HEADER_BYTES = 4 * 8
_CHECKSUM_WORDS = 1 << 20  # at a time, to bound the memory


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A stacked weight [L, ...] and where the optimizer keeps its state.

    main_N: what Adam updates: the weight itself (the same memory), its fp32 copy, or this rank's share of either; None: no share here.
    adam: Adam's state for it, empty before the first step.
    shares: elements [start, end) of the flat weight that each rank of `group` updates; without the distributed optimizer, all on each.
    """

    name: str
    weight: Tensor
    main_N: Tensor | None
    adam: dict[str, Tensor]
    shares: tuple[tuple[int, int], ...]
    group: dist.ProcessGroup | None

    @property
    def own_share(self) -> tuple[int, int]:
        return self.shares[self.group.rank() if self.group else 0]


@dataclasses.dataclass(frozen=True)
class StateTensor:
    """A weight, or an optimizer tensor of its shape.

    values_N: flat view of what this rank stores: the elements from `start` of the whole [L, row_numel]. In one's own share they are valid;
    weights outside of it may be old until the next forward, if Megatron overlaps their gathering with it.
    """

    name: str
    values_N: Tensor
    start: int
    row_numel: int
    shares: tuple[tuple[int, int], ...]
    group: dist.ProcessGroup | None

    def pieces(self, slot: int) -> Iterator[tuple[int, int, int]]:
        """(rank in `group`, start, end) for each part of the row of `slot`, relative to the row, and the rank whose values count."""
        first = slot * self.row_numel
        for rank, (start, end) in enumerate(self.shares):
            low, high = max(start - first, 0), min(end - first, self.row_numel)
            if low < high:
                yield rank, low, high

    def read(self, slot: int, start: int, end: int, out_N: Tensor) -> None:
        """Copy elements [start, end) of the row of `slot`, which this rank stores."""
        offset = slot * self.row_numel - self.start
        out_N.copy_(self.values_N[offset + start : offset + end])

    def write(self, slot: int, row_N: Tensor) -> None:
        """Store as much of the row of `slot` as belongs on this rank."""
        offset = slot * self.row_numel - self.start
        low, high = max(-offset, 0), min(self.values_N.numel() - offset, self.row_numel)
        if low < high:
            self.values_N[offset + low : offset + high].copy_(row_N[low:high])


@dataclasses.dataclass(frozen=True)
class ExpertState:
    """All tensors of a layer's experts, and how a row of one expert is laid out."""

    tensors: tuple[StateTensor, ...]

    @property
    def layout(self) -> PayloadLayout:
        return payload_layout(_HEADER, *((tensor.row_numel, tensor.values_N.dtype) for tensor in self.tensors))

    @property
    def description(self) -> str:
        """Equal on ranks that can exchange experts."""
        return str([(tensor.name, tensor.row_numel, tensor.values_N.dtype) for tensor in self.tensors])

    def columns(self, row_B: Tensor) -> list[tuple[StateTensor, Tensor]]:
        """Each tensor and its part of a row, as a flat view."""
        return [(tensor, part[0]) for tensor, part in zip(self.tensors, unpack(row_B[None], self.layout)[1:], strict=True)]


def expert_state(found: tuple[Parameter, ...], with_moments: bool) -> ExpertState:
    """The tensors that make up the experts. `with_moments`: Adam has made a step; a rank without a share of the state cannot know.

    Raises `ScaleMoEError` if this rank's state is not that: then moving what is known would lose the rest.
    """
    return ExpertState(tuple(tensor for parameter in found for tensor in _state_tensors(parameter, with_moments)))


def unseal(row_B: Tensor) -> None:
    """Mark a row as not filled, so that nobody takes what it held before for what it should hold."""
    row_B[:_HEADER_BYTES].zero_()


def seal(row_B: Tensor, layer: int, expert: int) -> None:
    """Write the header of a row that holds this expert's state."""
    header = row_B[:_HEADER_BYTES].view(torch.int64)
    header[:3] = torch.tensor([layer, expert, row_B.numel() - _HEADER_BYTES], device=row_B.device)
    header[3] = checksum(row_B[_HEADER_BYTES:])


def check_seal(row_B: Tensor, layer: int, expert: int) -> None:
    """Raises `ScaleMoEError` unless the row is this expert's, whole and unchanged; `Echo` if its sender did not fill it."""
    found_layer, found_expert, found_bytes, found_checksum = row_B[:_HEADER_BYTES].view(torch.int64).tolist()
    found, want = (found_layer, found_expert, found_bytes), (layer, expert, row_B.numel() - _HEADER_BYTES)
    if found == (0, 0, 0):
        raise Echo(f"layer {layer}: expert {expert} did not come")
    if found != want:
        problem = f"layer {layer}: expert {expert} was due, {want[2]} bytes"
        raise ScaleMoEError(problem, found=f"layer {found_layer}, expert {found_expert}, {found_bytes} bytes")
    arrived = int(checksum(row_B[_HEADER_BYTES:]))
    if arrived != found_checksum:
        problem = f"layer {layer}: expert {expert} was changed on its way"
        raise ScaleMoEError(problem, found=f"checksum {arrived:#x}, sent with {found_checksum:#x}")


def sealed_expert(row_B: Tensor) -> int:
    """The logical expert that a row holds."""
    return int(row_B[:_HEADER_BYTES].view(torch.int64)[1])


def checksum(bytes_B: Tensor) -> Tensor:
    """int64 scalar: the sum over i of (2i + 1) * word i, modulo 2**64; the words are int32.

    Changing any one word changes it, because its weight is odd; so does exchanging any two different words, which changes it by their
    difference times 2(i - j), less than 2**64 below 8 GiB.
    """
    words, total = bytes_B.view(torch.int32), torch.zeros((), dtype=torch.int64, device=bytes_B.device)
    for start in range(0, words.numel(), _CHECKSUM_WORDS):
        some = words[start : start + _CHECKSUM_WORDS]
        weights = torch.arange(2 * start + 1, 2 * (start + some.numel()), 2, device=words.device)
        total += (weights * some).sum()
    return total


def _state_tensors(parameter: Parameter, with_moments: bool) -> Iterator[StateTensor]:
    weight_N, (start, end) = parameter.weight.detach().view(-1), parameter.own_share
    names = MOMENTS if with_moments else ()
    empty_N = weight_N.new_empty(0, dtype=torch.float32)
    stored = {"weight": weight_N}
    if parameter.weight.dtype is not torch.float32:
        stored["main"] = empty_N if parameter.main_N is None else parameter.main_N.detach().view(-1)
    elif parameter.main_N is not None and parameter.main_N.data_ptr() != weight_N[start:end].data_ptr():
        raise ScaleMoEError(f"{parameter.name}: Adam should update the fp32 weight in place", found="a copy of it")
    if parameter.main_N is not None and set(parameter.adam) != set(names):
        raise ScaleMoEError(f"{parameter.name}: Adam should keep {names}, as on the other ranks", found=f"{sorted(parameter.adam)}")
    stored |= {name: parameter.adam[name].view(-1) if parameter.adam else empty_N for name in names}
    rest = dict(row_numel=parameter.weight[0].numel(), shares=parameter.shares, group=parameter.group)
    for name, values_N in stored.items():
        if name != "weight" and (values_N.dtype is not torch.float32 or values_N.numel() != end - start):
            problem = f"{parameter.name} {name} should be {end - start} fp32 values"
            raise ScaleMoEError(problem, found=f"{values_N.numel()} of {values_N.dtype}")
        yield StateTensor(f"{parameter.name} {name}", values_N, 0 if name == "weight" else start, **rest)
