"""The CUDA kernels compiled by g++ over emulated threads, several ranks in this process."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scalemoe.ops.transports.cuda import CudaTransport, Limits, SymmetricBuffers

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
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
