"""The pool of recycled memory: when blocks come back, which are taken, and what happens to them in threads, forks and at exit."""

import gc
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from megatron_scalemoe.ops.pool import HUGE_PAGE_BYTES, SMALLEST_BLOCK_BYTES, Pool

MIB = 1 << 20


def floats(pool: Pool, mib: float) -> torch.Tensor:
    return pool.empty((int(mib * MIB) // 4,), torch.float32)


def test_tensors_are_as_asked_and_memory_comes_again():
    pool = Pool()
    x = pool.empty((3, 1 << 20), torch.bfloat16)
    assert (x.shape, x.dtype, x.is_contiguous(), x.requires_grad) == ((3, 1 << 20), torch.bfloat16, True, False)
    address = x.data_ptr()
    part = x.fill_(7).view(2, -1)[1, 5:]
    del x
    assert pool.idle_bytes == 0, "a view still has it"
    del part
    assert pool.idle_bytes == 6 * MIB
    assert pool.empty((1 << 20,), torch.float32).data_ptr() == address
    small = pool.empty((SMALLEST_BLOCK_BYTES // 4 - 1,), torch.float32)
    del small
    assert pool.idle_bytes == 6 * MIB, "small tensors are torch's own"


def test_autograd_keeps_a_block_until_the_backward_pass_in_any_thread():
    pool = Pool()
    weight = torch.ones(2 * MIB, requires_grad=True)
    loss = (weight * floats(pool, 8).fill_(3)).sum()
    gc.collect()
    assert pool.idle_bytes == 0
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(30)
    assert pool.idle_bytes == 8 * MIB
    assert weight.grad[0] == 3


def test_the_smallest_block_that_fits_is_taken_unless_it_is_far_too_large():
    pool = Pool()
    tensors = {mib: floats(pool, mib) for mib in (40, 12, 10)}
    address = {mib: tensor.data_ptr() for mib, tensor in tensors.items()}
    tensors.clear()
    assert floats(pool, 9).data_ptr() == address[10]
    assert floats(pool, 12).data_ptr() == address[12]
    small = floats(pool, 4)
    assert small.data_ptr() not in address.values()
    assert floats(pool, 20).data_ptr() == address[40]


def test_idle_memory_is_bounded_and_the_oldest_goes():
    pool = Pool(max_idle_bytes=20 * MIB)
    first, second, third = (floats(pool, 8) for _ in range(3))
    address = [second.data_ptr(), third.data_ptr()]
    del first
    del second
    assert pool.idle_bytes == 16 * MIB
    del third
    assert pool.idle_bytes == 16 * MIB
    taken = [floats(pool, 8), floats(pool, 8)]
    assert [tensor.data_ptr() for tensor in taken] == address[::-1]  # the last to come back first
    huge = floats(pool, 30)
    del huge
    assert pool.idle_bytes <= 20 * MIB


def test_blocks_are_not_much_larger_than_asked():
    for num_bytes in (SMALLEST_BLOCK_BYTES, 33 * MIB + 1):
        pool = Pool()
        pool.empty((num_bytes,), torch.uint8)
        assert num_bytes <= pool.idle_bytes < max(num_bytes * 9 / 8, num_bytes + HUGE_PAGE_BYTES)


def test_a_tensor_may_die_while_the_pool_is_locked():
    pool = Pool()
    x = floats(pool, 8)
    address = x.data_ptr()
    with pool._lock:  # as when the garbage collector runs inside the pool
        del x
    assert floats(pool, 8).data_ptr() == address


def test_threads_never_share_a_block():
    pool = Pool(max_idle_bytes=24 * MIB)
    wrong = []

    def work(seed: int) -> None:
        draw, held = random.Random(seed), []
        for turn in range(60):
            tag = seed * 1000 + turn
            tensor = pool.empty((draw.randrange(4, 9) * MIB // 8,), torch.int64)
            tensor[:: 1 << 16] = tag
            held.append((tag, tensor))
            if len(held) > 3:
                old, tensor = held.pop(draw.randrange(len(held)))
                if not bool((tensor[:: 1 << 16] == old).all()):
                    wrong.append(old)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    gc.collect()
    assert wrong == []
    assert 0 < pool.idle_bytes <= 24 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_its_own_copy_even_if_the_pool_was_locked():
    pool = Pool()
    lent, idle = floats(pool, 8), floats(pool, 8)
    lent[0], address = 1, idle.data_ptr()
    del idle
    reading, writing = os.pipe()
    with pool._lock:
        child = os.fork()
    if child == 0:
        mine = floats(pool, 8)
        mine[0], lent[0] = 5, 6
        os.write(writing, b"same" if mine.data_ptr() == address else b"other")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 10) == b"same"
    os.close(reading), os.close(writing)
    assert lent[0] == 1
    again = floats(pool, 8)
    assert again.data_ptr() == address
    assert again[0] != 5


def test_the_interpreter_exits_cleanly_with_tensors_alive():
    script = """
import torch
from megatron_scalemoe.ops import pool
held = pool.empty((1 << 22,), torch.float32)
weight = torch.ones(1 << 22, requires_grad=True)
loss = (weight * pool.empty((1 << 22,), torch.float32)).sum()
cycle = [pool.empty((1 << 22,), torch.float32)]
cycle.append(cycle)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
