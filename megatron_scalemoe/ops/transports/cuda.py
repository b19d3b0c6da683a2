"""The transport of GPU ranks on one node: kernels write rows straight into the other ranks' memory (csrc/cuda).

Nothing here waits for the device or reads from it, so a dispatch and its combine can be captured in a CUDA graph. The price is fixed sizes:
rows have room for the most that can arrive, `tokens_per_expert` stays on the device, and rows behind the last expert's hold anything.

Calls of one transport must come in the same order on all ranks, and follow each other on the device: on one stream, or on several that the
caller orders by events.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.permute import DTYPE_CODES

DTYPES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype != torch.float64}
WORD_BYTES = 16  # what a lane moves at a time; rows consist of these
MAX_RANKS, MAX_EXPERTS_PER_TOKEN, MAX_LOCAL_EXPERTS, MAX_COUNT_BYTES = 32, 32, 1024, 65536  # as in csrc/cuda/layout.h
PUSH_BLOCKS = 32  # of 512 threads: enough for NVLink, and most of the GPU stays free for what overlaps

_HANDLE, _POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_LAUNCHERS = {
    "dispatch_push": (_HANDLE, *[_POINTER] * 3, *[_INT] * 5, _POINTER),
    "dispatch_receive": (_HANDLE, *[_INT] * 6, *[_POINTER] * 4, _POINTER),
    "rows_receive": (_HANDLE, *[_INT] * 4, *[_POINTER] * 2, _POINTER),
    "combine_push": (_HANDLE, *[_POINTER] * 3, *[_INT] * 6, _POINTER),
    "combine_receive": (_HANDLE, _POINTER, *[_INT] * 6, *[_POINTER] * 2, _POINTER),
    "gather_counts": (_HANDLE, _POINTER, _INT, _POINTER, _POINTER),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest call that a transport has room for. The same on all ranks.

    max_tokens: of one rank. max_experts: per token. max_row_bytes: hidden size times the dtype's bytes. max_rows: rows of one rank's
    experts before padding; None for the most there can be, with which no row is ever too many.
    """

    max_tokens: int
    max_experts: int
    max_row_bytes: int
    max_rows: int | None = None

    def row_capacity(self, num_ranks: int, experts_per_token: int, num_local: int, alignment: int) -> int:
        """Rows of the tensor that `dispatch` returns."""
        most = num_ranks * self.max_tokens * min(experts_per_token, num_local)
        return min(most, self.max_rows or most) + num_local * (alignment - 1)

    def buffer_bytes(self, library: ctypes.CDLL, num_ranks: int) -> int:
        """Memory that each rank shares with the others."""
        bytes_ = _declared(library).scalemoe_cuda_buffer_bytes
        return bytes_(num_ranks, self.max_tokens, self.max_experts, self.max_row_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class SymmetricBuffers:
    """One buffer of each rank, zeroed. pointers[g]: rank g's, as this rank sees it. close() gives them back."""

    rank: int
    pointers: Sequence[int]
    close: Callable[[], None]


class CudaTransport:
    """Owns this rank's end of an exchange between the ranks of `buffers`: the handle, its counters, its record of failures.

    `Transport` says what the methods do. Each is a push, which writes to the peers and waits for nobody, and a receive, which
    waits for all pushes; the two halves can be called one by one. `ranks` are the ranks' names in errors.
    """

    name = "cuda"

    def __init__(
        self,
        library: ctypes.CDLL,
        buffers: SymmetricBuffers,
        limits: Limits,
        timeout_s: float,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ):
        self.group, self.limits, self.device = group, limits, device
        self.rank, self.num_ranks = buffers.rank, len(buffers.pointers)
        for most, found, what in ((MAX_RANKS, self.num_ranks, "ranks"), (MAX_EXPERTS_PER_TOKEN, limits.max_experts, "experts per token")):
            if found > most:
                raise ScaleMoEError(f"the cuda transport is for at most {most} {what}", found=found, try_="--scalemoe-transport collective")
        self.ranks = dist.get_process_group_ranks(group) if group is not None else list(range(self.num_ranks))
        self._library, self._buffers = _declared(library), buffers
        on_gpu = device.type == "cuda"
        self._state = torch.zeros(library.scalemoe_cuda_state_bytes(), dtype=torch.uint8, device=device)
        self._failure = torch.zeros(4, dtype=torch.int32, pin_memory=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(device)  # the zeros must be there before any stream uses them
        pointers = (ctypes.c_void_p * self.num_ranks)(*buffers.pointers)
        sizes = (self.num_ranks, self.rank, limits.max_tokens, limits.max_experts, limits.max_row_bytes, PUSH_BLOCKS, int(timeout_s * 1e9))
        self._handle = library.scalemoe_cuda_open(*sizes, pointers, self._state.data_ptr(), self._failure.data_ptr())
        if not self._handle:
            raise MemoryError("no memory for the handle of a cuda transport")
        self._record = (ctypes.c_uint32 * 4).from_address(self._failure.data_ptr())
        self._finalizer = weakref.finalize(self, library.scalemoe_cuda_close, self._handle)

    def check(self) -> None:
        """Raise `ScaleMoEError` if an operation that the device has got to failed. Waits for nothing; each method starts with it."""
        code, culprits, reporter, detail = self._record
        if code:
            raise self._error(code, [self.ranks[g] for g in range(self.num_ranks) if culprits >> g & 1], self.ranks[reporter], detail)

    def gather_counts(self, counts_Q: Tensor) -> Tensor:
        counts_Q = _aligned(counts_Q)
        gathered = counts_Q.new_empty(self.num_ranks, *counts_Q.shape)
        if counts_Q.nbytes > MAX_COUNT_BYTES:
            raise ScaleMoEError(f"the cuda transport takes counts of at most {MAX_COUNT_BYTES} bytes", found=counts_Q.nbytes)
        self._launch("gather_counts", counts_Q, counts_Q.nbytes, gathered)
        return gathered

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.dispatch_push(x_TD, experts_TK, probs_TK, num_local)
        return self.dispatch_receive(x_TD, experts_TK, probs_TK, num_local, alignment)

    def combine(self, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int) -> Tensor:
        self.combine_push(rows_RD, map, experts_TK, num_local)
        return self.combine_receive(rows_RD, experts_TK, num_local)[0]

    def combine_backward(self, grad_y_TD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, num_rows: int) -> Tensor:
        self.dispatch_push(grad_y_TD, experts_TK, None, num_local)
        return self.rows_receive(grad_y_TD, map, experts_TK, num_local, num_rows)

    def dispatch_backward(
        self, grad_rows_RD: Tensor, grad_row_probs_R: Tensor, map: Tensor, experts_TK: Tensor, num_local: int
    ) -> tuple[Tensor, Tensor]:
        self.combine_push(grad_rows_RD, map, experts_TK, num_local, grad_row_probs_R)
        return self.combine_receive(grad_rows_RD, experts_TK, num_local, grad_row_probs_R)

    def dispatch_push(self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor | None, num_local: int) -> None:
        """The first half of `dispatch`, or without probabilities of `combine_backward`."""
        self._check_call(x_TD, experts_TK, num_local, probs_TK)
        if len(x_TD) != len(experts_TK):
            raise self._refusal("as many rows as tokens that have experts", len(x_TD))
        x_TD, experts_TK, probs_TK = map(_aligned, (x_TD, experts_TK, probs_TK))
        sizes = (*experts_TK.shape, num_local, _row_bytes(x_TD), _prob_bytes(probs_TK))
        self._launch("dispatch_push", x_TD, experts_TK, probs_TK, *sizes)

    def dispatch_receive(
        self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The second half of `dispatch`. Of the tensors it uses only shapes and dtypes."""
        experts_per_token = experts_TK.shape[1]
        capacity = self.limits.row_capacity(self.num_ranks, experts_per_token, num_local, alignment)
        map_items = self._library.scalemoe_cuda_map_items(self.num_ranks, self.limits.max_tokens, experts_per_token, num_local)
        rows, row_probs = x_TD.new_empty(capacity, x_TD.shape[1]), probs_TK.new_empty(capacity)
        tokens_per_expert, row_map = experts_TK.new_empty(num_local, dtype=torch.int64), experts_TK.new_empty(map_items)
        sizes = (experts_per_token, num_local, _row_bytes(x_TD), probs_TK.itemsize, capacity, alignment)
        self._launch("dispatch_receive", *sizes, rows, row_probs, tokens_per_expert, row_map)
        return rows, row_probs, tokens_per_expert, row_map

    def rows_receive(self, grad_y_TD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, num_rows: int) -> Tensor:
        """The second half of `combine_backward`. Of the gradients it uses only length and dtype."""
        grad_rows = grad_y_TD.new_empty(num_rows, grad_y_TD.shape[1])
        self._launch("rows_receive", experts_TK.shape[1], num_local, _row_bytes(grad_y_TD), num_rows, grad_rows, map)
        return grad_rows

    def combine_push(self, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, row_probs_R: Tensor | None = None) -> None:
        """The first half of `combine`, or with the rows' probabilities of `dispatch_backward`."""
        self._check_call(rows_RD, experts_TK, num_local, row_probs_R)
        rows_RD, row_probs_R = _aligned(rows_RD), _aligned(row_probs_R)
        sizes = (rows_RD.shape[0], experts_TK.shape[1], num_local, _row_bytes(rows_RD), _prob_bytes(row_probs_R), DTYPES[rows_RD.dtype])
        self._launch("combine_push", rows_RD, row_probs_R, map, *sizes)

    def combine_receive(
        self, rows_RD: Tensor, experts_TK: Tensor, num_local: int, row_probs_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The second half of both. Of the rows and their probabilities it uses only lengths and dtypes."""
        y_TD = rows_RD.new_empty(experts_TK.shape[0], rows_RD.shape[1])
        probs_TK = None if row_probs_R is None else row_probs_R.new_empty(experts_TK.shape)
        sizes = (*experts_TK.shape, num_local, _row_bytes(rows_RD), _prob_bytes(row_probs_R), DTYPES[rows_RD.dtype])
        self._launch("combine_receive", _aligned(experts_TK), *sizes, y_TD, probs_TK)
        return y_TD, probs_TK

    def close(self) -> None:
        """Give the memory back, after this rank's last operation and all others' has run. Not collective."""
        if self._finalizer.alive:
            self._finalizer()
            self._buffers.close()

    def _launch(self, name: str, *arguments: Tensor | int | None) -> None:
        self.check()
        if not self._finalizer.alive:
            raise ScaleMoEError(f"{name} on a transport that is closed")
        on_gpu = self.device.type == "cuda"
        # the emulation has a stream for each handle
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else self._handle
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            pointers = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
            code = getattr(self._library, f"scalemoe_cuda_{name}")(self._handle, *pointers, stream)
        if code:
            raise ScaleMoEError(f"CUDA could not launch {name}", found=f"CUDA error {code}")

    def _check_call(self, rows: Tensor, experts_TK: Tensor, num_local: int, probs: Tensor | None) -> None:
        num_tokens, experts_per_token = experts_TK.shape
        row_bytes, limits = _row_bytes(rows), self.limits
        expected = (
            (rows.device == experts_TK.device == self.device, f"tensors on {self.device}", rows.device),
            (rows.dtype in DTYPES, "rows of fp32, bf16 or fp16", rows.dtype),
            (row_bytes % WORD_BYTES == 0 and row_bytes > 0, "rows of a multiple of 16 bytes", row_bytes),
            (row_bytes <= limits.max_row_bytes, f"rows of at most {limits.max_row_bytes} bytes", row_bytes),
            (num_tokens <= limits.max_tokens, f"at most {limits.max_tokens} tokens on a rank", num_tokens),
            (0 < experts_per_token <= limits.max_experts, f"1 to {limits.max_experts} experts per token", experts_per_token),
            (0 < num_local <= MAX_LOCAL_EXPERTS, f"1 to {MAX_LOCAL_EXPERTS} experts on a rank", num_local),
            (experts_TK.dtype == torch.int32, "experts of torch.int32", experts_TK.dtype),
            (probs is None or probs.itemsize in (2, 4, 8), "probabilities of 2, 4 or 8 bytes", probs is not None and probs.dtype),
        )
        for fits, what, found in expected:
            if not fits:
                raise self._refusal(what, found)

    def _refusal(self, takes: str, found: object) -> ScaleMoEError:
        return ScaleMoEError(f"this cuda transport takes {takes}", found=found, try_="--scalemoe-transport collective")

    def _error(self, code: int, culprits: list[int], reporter: int, detail: int) -> ScaleMoEError:
        what = {
            1: f"ranks {culprits} did not get to the same operation in time",
            2: f"rank {culprits[0]} got more rows than it has room for" + (f": {detail}" if detail else ""),
            3: f"ranks {culprits} called another operation than rank {reporter}, or with other sizes",
            4: f"rank {culprits[0]} gave experts that are not ascending, or out of range",
            5: f"rank {culprits[0]} gave fewer rows than the map of their dispatch has",
        }[code]
        tries = {1: "the first error in these ranks' logs", 2: "a larger max_rows, or none"}
        return ScaleMoEError(
            f"exchange between ranks {self.ranks} failed: {what}", found=f"noticed by rank {reporter}", try_=tries.get(code)
        )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions told their argument types, without which ctypes would cut pointers to 32 bits."""
    for name, arguments in _LAUNCHERS.items():
        getattr(library, f"scalemoe_cuda_{name}").argtypes = arguments
    for name in ("state_bytes", "map_items", "buffer_bytes"):
        getattr(library, f"scalemoe_cuda_{name}").restype = _LONG
    library.scalemoe_cuda_map_items.argtypes = (_LONG,) * 4
    library.scalemoe_cuda_buffer_bytes.argtypes = (_INT, _INT, _INT, _LONG)
    library.scalemoe_cuda_open.argtypes = (*[_INT] * 4, _LONG, _INT, _LONG, *[_POINTER] * 3)
    library.scalemoe_cuda_open.restype = _HANDLE
    library.scalemoe_cuda_close.argtypes = (_HANDLE,)
    return library


def _aligned(x: Tensor | None) -> Tensor | None:
    """x or a copy of it: contiguous, and starting where a word can."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % WORD_BYTES == 0 else x.clone()


def _row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.itemsize


def _prob_bytes(probs: Tensor | None) -> int:
    return 0 if probs is None else probs.itemsize
