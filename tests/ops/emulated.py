"""The CUDA kernels compiled by g++ over emulated threads, several ranks in this process, and what their exchange must give."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scalemoe.ops.transports.cuda import CudaTransport, Limits, SymmetricBuffers

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-O1", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
CPU = torch.device("cpu")


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    command = ["g++", *FLAGS, *flags, "-c", "-x", "c++", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return target


def link(target: Path, objects: Sequence[Path], *flags: str) -> Path:
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(target)], check=True, capture_output=True, timeout=120)
    return target


def build_library(folder: Path) -> Path:
    """libscalemoe_emulated.so: the launchers of csrc/cuda, run by the emulation."""
    sources = (SOURCES / "cuda" / "launch.cu", SOURCES / "emulation" / "fibers.cpp")
    return link(folder / "libscalemoe_emulated.so", [compile_object(s, folder / f"{s.stem}.o") for s in sources], "-shared")


def load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.scalemoe_emulated_defer.argtypes = (ctypes.c_uint64,)
    return library


class _Keeper(TorchDispatchMode):
    """Keeps all tensors: a GPU's memory is given back in stream order, a CPU's at once."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


@contextlib.contextmanager
def interleaved(library: ctypes.CDLL, seed: int) -> Iterator[None]:
    """Operations of all ranks inside only queue, as on a GPU; at the end they run, interleaved at random, in simulated time."""
    library.scalemoe_emulated_defer(seed)
    with _Keeper() as keeper:
        try:
            yield
        finally:
            library.scalemoe_emulated_run()
            keeper.kept.clear()


def open_ranks(library: ctypes.CDLL, num_ranks: int, limits: Limits, timeouts_s: Sequence[float] | float = 1.0) -> list[CudaTransport]:
    """The transports of `num_ranks` ranks that all live in this process. Every method must then be called inside `interleaved`."""
    buffers = [torch.zeros(limits.buffer_bytes(library, num_ranks), dtype=torch.uint8) for _ in range(num_ranks)]
    pointers = [buffer.data_ptr() for buffer in buffers]
    timeouts_s = [timeouts_s] * num_ranks if isinstance(timeouts_s, float) else timeouts_s
    # close holds the memory
    return [
        CudaTransport(library, SymmetricBuffers(rank, pointers, buffers.clear), limits, timeouts_s[rank], CPU) for rank in range(num_ranks)
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange; ranks have `tokens` tokens each, in turn. A token wants each column with a chance that makes about K of them."""

    ranks: int = 2
    top_k: int = 2
    num_local: int = 2
    tokens: tuple[int, ...] = (24, 17)
    columns: int = 32
    dtype: torch.dtype = torch.float32
    probs_dtype: torch.dtype = torch.float32
    alignment: int = 1
    wanted: float = 1.0
    max_rows: int | None = None

    @property
    def limits(self) -> Limits:
        return Limits(max(*self.tokens, 1), self.top_k, self.columns * self.dtype.itemsize, self.max_rows)

    @property
    def capacity(self) -> int:
        return self.limits.row_capacity(self.ranks, self.top_k, self.num_local, self.alignment)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one rank: rows and gradients to send, and those that its experts give back."""

    x: Tensor
    experts: Tensor
    probs: Tensor
    grad_y: Tensor
    expert_out: Tensor
    grad_rows: Tensor
    grad_row_probs: Tensor
    counts: Tensor


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of one rank."""

    rows: Tensor
    row_probs: Tensor
    tokens_per_expert: Tensor
    y: Tensor
    grad_rows: Tensor
    grad_x: Tensor
    grad_probs: Tensor
    gathered: Tensor


def make_inputs(case: Case, rank: int, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(1000 * seed + rank)
    tokens, columns = case.tokens[rank % len(case.tokens)], case.ranks * case.num_local
    wants = torch.rand(tokens, columns, generator=g) < case.wanted * min(1.0, (case.top_k + 0.5) / columns)
    chosen = (torch.rand(tokens, columns, generator=g) + 1) * wants
    kept = (chosen > 0) & (chosen >= chosen.sort(1, descending=True).values[:, : case.top_k][:, -1:])
    experts = torch.where(kept, torch.arange(columns), columns).sort(1).values
    experts = torch.nn.functional.pad(experts, (0, case.top_k), value=columns)[:, : case.top_k]
    experts = experts.masked_fill(experts == columns, -1).int().contiguous()
    probs = torch.rand(tokens, case.top_k, generator=g).to(case.probs_dtype) * (experts >= 0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, case.columns, generator=g).to(case.dtype)

    return Inputs(
        random(tokens),
        experts,
        probs,
        random(tokens),
        random(case.capacity),
        random(case.capacity),
        torch.rand(case.capacity, generator=g).to(case.probs_dtype),
        torch.randint(1000, (columns,), generator=g),
    )


def run_operations(transport: CudaTransport, inputs: Inputs, case: Case) -> Outputs:
    """All operations of one step on one rank, one after the other."""
    gathered = transport.gather_counts(inputs.counts)
    rows, row_probs, tokens_per_expert, map = transport.dispatch(inputs.x, inputs.experts, inputs.probs, case.num_local, case.alignment)
    y = transport.combine(inputs.expert_out, map, inputs.experts, case.num_local)
    grad_rows = transport.combine_backward(inputs.grad_y, map, inputs.experts, case.num_local, len(rows))
    grads = transport.dispatch_backward(inputs.grad_rows, inputs.grad_row_probs, map, inputs.experts, case.num_local)
    return Outputs(rows, row_probs, tokens_per_expert, y, grad_rows, *grads, gathered)


def expected_outputs(ranks: Sequence[Inputs], case: Case) -> list[Outputs]:
    """What each rank must get, by plain indexing. Rows end where the last expert's do."""
    placed = [place_rows(ranks, case, g) for g in range(len(ranks))]
    received = [receive(ranks, case, *placed[g]) for g in range(len(ranks))]
    gathered = torch.stack([inputs.counts for inputs in ranks])
    outputs = []
    for s, inputs in enumerate(ranks):
        row_of_GTK = torch.stack([row_of[s] for row_of, _ in placed])
        y = sum_back([r.expert_out for r in ranks], row_of_GTK)
        grad_x = sum_back([r.grad_rows for r in ranks], row_of_GTK)
        grad_probs = torch.zeros_like(inputs.probs)
        for r, row_of_TK in zip(ranks, row_of_GTK, strict=True):
            grad_probs = torch.where(row_of_TK >= 0, r.grad_row_probs[row_of_TK.clamp(min=0)], grad_probs)
        rows, row_probs, grad_rows = received[s]
        outputs.append(Outputs(rows, row_probs, placed[s][1], y, grad_rows, grad_x, grad_probs, gathered))
    return outputs


def place_rows(ranks: Sequence[Inputs], case: Case, g: int) -> tuple[list[Tensor], Tensor]:
    """The row at rank g of each (source, token, k), -1 for none; and tokens_per_expert, padding included."""
    row_of, counts, row = [torch.full_like(inputs.experts, -1).long() for inputs in ranks], [], 0
    for expert in range(g * case.num_local, (g + 1) * case.num_local):
        first = row
        for s, inputs in enumerate(ranks):
            wants_TK = inputs.experts == expert
            row_of[s][wants_TK] = row + torch.arange(int(wants_TK.sum()))
            row += int(wants_TK.sum())
        row += (first - row) % case.alignment
        counts.append(row - first)
    return row_of, torch.tensor(counts)


def receive(ranks: Sequence[Inputs], case: Case, row_of: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows, row_probs and the gradients of the experts' outputs at one rank."""
    num_rows = int(counts.sum())
    rows, grad_rows = (torch.zeros(num_rows, case.columns, dtype=case.dtype) for _ in range(2))
    row_probs = torch.zeros(num_rows, dtype=case.probs_dtype)
    for inputs, row_of_TK in zip(ranks, row_of, strict=True):
        t, k = (row_of_TK >= 0).nonzero(as_tuple=True)
        rows[row_of_TK[t, k]], grad_rows[row_of_TK[t, k]] = inputs.x[t], inputs.grad_y[t]
        row_probs[row_of_TK[t, k]] = inputs.probs[t, k]
    return rows, row_probs, grad_rows


def sum_back(rows_G: Sequence[Tensor], row_of_GTK: Tensor) -> Tensor:
    """Each rank's rows of a token summed in fp32 in ascending order of experts and rounded, then the ranks' sums likewise."""
    num_tokens, columns, dtype = row_of_GTK.shape[1], rows_G[0].shape[1], rows_G[0].dtype
    y = torch.zeros(num_tokens, columns)
    for rows, row_of_TK in zip(rows_G, row_of_GTK, strict=True):
        partial = torch.zeros(num_tokens, columns)
        for row_of_T in row_of_TK.unbind(1):
            (t,) = (row_of_T >= 0).nonzero(as_tuple=True)
            partial[t] += rows[row_of_T[t]].float()
        y += partial.to(dtype).float()
    return y.to(dtype)


def differing(outputs: Outputs, expected: Outputs) -> list[str]:
    """Names of the outputs that are not equal bit by bit (but for the sign of zero)."""
    num_rows = len(expected.rows)
    cut = dataclasses.replace(
        outputs, rows=outputs.rows[:num_rows], row_probs=outputs.row_probs[:num_rows], grad_rows=outputs.grad_rows[:num_rows]
    )
    names = [field.name for field in dataclasses.fields(Outputs)]
    return [name for name in names if not torch.equal(getattr(cut, name), getattr(expected, name))]
