"""Recycled memory for large results on the CPU.

The C library gives a large block back to the system when it is freed, and the next one costs a page fault for every 4 KB: more time than
writing it. Here blocks stay, and lie in huge pages where the system has them.
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

# What is smaller comes from the C library, which keeps such memory itself.
SMALLEST_BLOCK_BYTES = 4 << 20
HUGE_PAGE_BYTES = 2 << 20
MAX_IDLE_BYTES = 1 << 30


class Pool:
    """Owns blocks of private memory, and lends them to tensors.

    A block comes back when its tensor's storage dies: no view of it, nor anything that autograd saved, is left. Blocks that nobody has
    are kept, at most `max_idle_bytes` of them; beyond that the ones idle for longest go back to the system. Any thread may ask, and any
    may drop a tensor. A forked child has the blocks as it has any memory: copied when written.
    """

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES):
        self.max_idle_bytes = max_idle_bytes
        self._idle: list[mmap.mmap] = []  # in the order in which they came back
        self._idle_bytes = 0
        # By the identity of the reference that tells of the storage's death.
        self._lent: dict[int, tuple[weakref.ref, mmap.mmap]] = {}
        # Blocks come back here first, without the lock: the garbage collector may drop a tensor while this very thread holds it.
        self._returned: collections.deque[mmap.mmap] = collections.deque()
        self._lock = threading.Lock()
        _pools.add(self)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised, contiguous CPU tensor. Its storage cannot be resized."""
        count = math.prod(shape)
        if count * dtype.itemsize < SMALLEST_BLOCK_BYTES:
            return torch.empty(shape, dtype=dtype)
        block = self._take(count * dtype.itemsize)
        lease = memoryview(block)  # the storage alone holds it
        death = weakref.ref(lease, self._give_back)
        self._lent[id(death)] = death, block
        return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)

    @property
    def idle_bytes(self) -> int:
        """Memory that no tensor has."""
        with self._lock:
            self._sort_in()
            return self._idle_bytes

    def _take(self, num_bytes: int) -> mmap.mmap:
        """The smallest idle block that is large enough and at most twice as large, or a new one.

        Of equals the last to come back: the caches may still have it.
        """
        with self._lock:
            self._sort_in()
            fitting = [(len(block), -i) for i, block in enumerate(self._idle) if num_bytes <= len(block) <= 2 * num_bytes]
            if fitting:
                block = self._idle.pop(-min(fitting)[1])
                self._idle_bytes -= len(block)
                return block
        return _map(num_bytes)

    def _give_back(self, death: weakref.ref) -> None:
        self._returned.append(self._lent.pop(id(death))[1])
        # Somebody else at it sorts this one in, too, or the next call does.
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """With the lock held: returned blocks to the idle ones, and the oldest away while there are too many bytes."""
        while self._returned:
            self._idle.append(self._returned.popleft())
            self._idle_bytes += len(self._idle[-1])
        while self._idle_bytes > self.max_idle_bytes:
            self._idle_bytes -= len(self._idle.pop(0))

    def _after_fork(self) -> None:
        # Another thread may have held it in the parent.
        self._lock = threading.Lock()


def _map(num_bytes: int) -> mmap.mmap:
    """New private memory, in whole steps, so that sizes that vary a little share blocks."""
    step = max(HUGE_PAGE_BYTES, 1 << (num_bytes.bit_length() - 4))
    block = mmap.mmap(-1, -(-num_bytes // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_default = Pool()
empty = _default.empty
os.register_at_fork(after_in_child=lambda: [pool._after_fork() for pool in _pools])
