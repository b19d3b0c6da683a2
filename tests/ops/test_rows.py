"""csrc/cpu/rows.h and parallel.h: every kernel that this processor can run, compiled by themselves."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc" / "cpu"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
PROGRAM = """
#include "parallel.h"
using namespace scalemoe;
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") ? 3 : __builtin_cpu_supports("avx2") ? 2 : 1;
#else
  return 1;
#endif
}
static RowKernels kernel(int i) {
#if defined(__x86_64__)
  if (i == 2) return {stream_avx512, sum_pointers_avx512, sum_indices_avx512};
  if (i == 1) return {stream_avx2, sum_pointers_avx2, sum_indices_avx2};
  return {stream_sse2, sum_pointers_sse2, sum_indices_sse2};
#else
  return kRowKernels;
#endif
}
EXPORT void sum_by(int i, void* dst, const void* const* src, int64_t n, int64_t columns, int dtype) {
  kernel(i).sum_pointers(dst, {src}, n, 0, columns, dtype);
}
EXPORT void stream_by(int i, char* dst, const char* src, size_t bytes) {
  kernel(i).stream(dst, src, bytes);
  fence_stores();
}
EXPORT void sum(void* dst, const void* const* src, int64_t n, int64_t columns, int dtype, bool non_temporal) {
  sum_rows(dst, src, n, columns, dtype, non_temporal);
  fence_stores();
}
EXPORT void visit(int64_t n, int64_t bytes, int threads, int32_t* visits) {
  parallel_for(n, bytes, threads, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; i++) visits[i]++; });
}
"""


@functools.cache
def compiled(folder: Path) -> ctypes.CDLL:
    (folder / "rows.cpp").write_text(PROGRAM)
    command = ["g++", "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run([*command, "rows.cpp", "-o", "rows.so"], cwd=folder, check=True, timeout=120)
    return ctypes.CDLL(str(folder / "rows.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return compiled(tmp_path_factory.mktemp("rows"))


def call_sum(function, rows: list[torch.Tensor], *extra, before: tuple = (), offset: int = 0) -> torch.Tensor:
    """Sum into memory that lies `offset` bytes off, with a guard behind it."""
    columns, dtype = rows[0].numel(), rows[0].dtype
    memory = torch.full((columns * dtype.itemsize + 64 + offset,), 0xA5, dtype=torch.uint8)
    pointers = (ctypes.c_void_p * len(rows))(*[row.data_ptr() for row in rows])
    target = ctypes.c_void_p(memory.data_ptr() + offset)
    function(*before, target, pointers, ctypes.c_int64(len(rows)), ctypes.c_int64(columns), DTYPE_CODES[dtype], *extra)
    end = offset + columns * dtype.itemsize
    assert bool((memory[end:] == 0xA5).all() and (memory[:offset] == 0xA5).all()), "written outside"
    return memory[offset:end].clone().view(dtype)


def expected_sum(rows: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(rows[0].dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert bool(same.all()), (found[~same][:4], expected[~same][:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_every_16_bit_pattern(library, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    tiny = (torch.randn(65536) * 1e-6).to(dtype)
    for kernel in range(library.kernels()):
        for rows in ([every, torch.zeros_like(every)], [every, shuffled], [every, tiny, shuffled]):
            assert_same(call_sum(library.sum_by, rows, before=(kernel,)), expected_sum(rows))


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_sums_of_any_length_and_alignment(library, dtype):
    for columns in (1, 3, 8, 15, 31, 64, 65, 200, 5000):
        for count in (1, 2, 3, 8):
            rows = [torch.randn(columns + 1).to(dtype)[1:] for _ in range(count)]
            expected = expected_sum(rows)
            for kernel in range(library.kernels()):
                assert torch.equal(call_sum(library.sum_by, rows, before=(kernel,)), expected)
            for non_temporal in (False, True):
                for offset in (0, 2, 16):
                    assert torch.equal(call_sum(library.sum, rows, non_temporal, offset=offset), expected)


def test_no_row_gives_zeros_and_one_row_its_own_bits(library):
    memory = torch.ones(37)
    library.sum(ctypes.c_void_p(memory.data_ptr()), None, ctypes.c_int64(0), ctypes.c_int64(37), 0, False)
    assert not memory.any()
    odd = torch.tensor([0x7FA12345, -(1 << 31), 0x7F800000], dtype=torch.int32).view(torch.float32)  # a signalling NaN, -0, infinity
    assert torch.equal(call_sum(library.sum, [odd], False).view(torch.int32), odd.view(torch.int32))


def test_streamed_copies(library):
    source = torch.randint(0, 256, (3000,), dtype=torch.uint8)
    for kernel in range(library.kernels()):
        for start, size, offset in ((0, 2048, 0), (1, 2048, 5), (7, 1, 63), (3, 255, 1), (64, 0, 0), (5, 2900, 40)):
            target = torch.full((3100,), 0xA5, dtype=torch.uint8)
            addresses = ctypes.c_void_p(target.data_ptr() + offset), ctypes.c_void_p(source.data_ptr() + start)
            library.stream_by(kernel, *addresses, ctypes.c_size_t(size))
            expected = torch.full((3100,), 0xA5, dtype=torch.uint8)
            expected[offset : offset + size] = source[start : start + size]
            assert torch.equal(target, expected)


@pytest.mark.parametrize("threads", [0, 1, 3, 1000])
@pytest.mark.parametrize("n", [0, 1, 5, 1000, 12345])
def test_a_parallel_loop_visits_everything_once(library, n, threads):
    for num_bytes in (0, 1 << 40):
        visits = torch.zeros(n + 1, dtype=torch.int32)
        library.visit(ctypes.c_int64(n), ctypes.c_int64(num_bytes), threads, ctypes.c_void_p(visits.data_ptr()))
        assert visits.tolist() == [1] * n + [0]
