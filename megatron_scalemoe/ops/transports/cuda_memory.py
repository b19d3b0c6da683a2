"""Memory of each GPU rank of a node that all the others can write to, and the transport over it."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.ragged import gather_objects
from megatron_scalemoe.ops.transports.cuda import CudaTransport, Limits, SymmetricBuffers

IPC_HANDLE_BYTES = 64


class CudaUnavailable(ScaleMoEError):
    """These ranks cannot write to each other's memory; all of them get this error, with the reason."""


def open_cuda(group: dist.ProcessGroup, limits: Limits, timeout_s: float) -> CudaTransport:
    """Collective: the transport of `group`, whose ranks have GPUs of one node, the native library, and the same `limits`.

    timeout_s bounds each wait for a peer. Raises `CudaUnavailable` on all ranks alike.
    """
    library, device = native.cuda(), torch.device("cuda", torch.cuda.current_device())
    assert library is not None, native.why_not("cuda")
    buffers = _open_buffers(group, limits.buffer_bytes(library, group.size()), device, library)
    transport = CudaTransport(library, buffers, limits, timeout_s, device, group)
    gather_objects(None, group)  # nobody may write before all are open
    return transport


def _open_buffers(group: dist.ProcessGroup, nbytes: int, device: torch.device, library: ctypes.CDLL) -> SymmetricBuffers:
    """By torch's symmetric memory, or else by CUDA's inter-process handles; the same way on all ranks."""
    reasons = []
    for open_by in (_by_symmetric_memory, _by_ipc_handles):
        buffers, problem = None, None
        try:
            buffers = open_by(group, nbytes, device, library)
        except (RuntimeError, ImportError, AttributeError) as error:  # of torch, of CUDA, or of a torch without the module
            problem = str(error).splitlines()[0]
        ranks = dist.get_process_group_ranks(group)
        problems = [f"rank {rank}: {found}" for rank, found in zip(ranks, gather_objects(problem, group), strict=True) if found]
        if not problems:
            return buffers
        if buffers is not None:
            buffers.close()
        reasons += problems
    raise CudaUnavailable("these ranks cannot map each other's GPU memory", found="; ".join(reasons))


def _by_symmetric_memory(group: dist.ProcessGroup, nbytes: int, device: torch.device, library: ctypes.CDLL) -> SymmetricBuffers:
    import torch.distributed._symmetric_memory as symmetric_memory

    owned = [symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device).zero_()]
    torch.cuda.synchronize(device)
    mapped = symmetric_memory.rendezvous(owned[0], group)
    pointers = list(mapped.buffer_ptrs)
    if pointers[group.rank()] != owned[0].data_ptr():
        raise RuntimeError("symmetric memory does not start where its tensor does")
    return SymmetricBuffers(group.rank(), pointers, owned.clear)


def _by_ipc_handles(group: dist.ProcessGroup, nbytes: int, device: torch.device, library: ctypes.CDLL) -> SymmetricBuffers:
    library.scalemoe_cuda_shared_create.argtypes = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    library.scalemoe_cuda_shared_open.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    for name in ("close", "free"):
        getattr(library, f"scalemoe_cuda_shared_{name}").argtypes = (ctypes.c_void_p,)
    library.scalemoe_cuda_error_text.restype = ctypes.c_char_p
    own, handle = ctypes.c_void_p(), ctypes.create_string_buffer(IPC_HANDLE_BYTES)
    failed = library.scalemoe_cuda_shared_create(nbytes, ctypes.byref(own), handle)
    handles = gather_objects((failed, handle.raw), group)
    opened: list[int | None] = [None] * group.size()
    for peer, (peer_failed, peer_handle) in enumerate(handles):
        failed = failed or peer_failed
        if failed or peer == group.rank():
            continue
        pointer = ctypes.c_void_p()
        failed = library.scalemoe_cuda_shared_open(ctypes.create_string_buffer(peer_handle, IPC_HANDLE_BYTES), ctypes.byref(pointer))
        opened[peer] = pointer.value

    def close() -> None:
        for pointer in filter(None, opened):
            library.scalemoe_cuda_shared_close(pointer)
        if own.value:
            library.scalemoe_cuda_shared_free(own)

    if failed:
        close()
        raise RuntimeError(f"CUDA inter-process memory: {library.scalemoe_cuda_error_text(failed).decode()}")
    opened_with_own = [own.value if peer == group.rank() else pointer for peer, pointer in enumerate(opened)]
    return SymmetricBuffers(group.rank(), opened_with_own, close)
