"""What nvcc makes of the kernels: no spills, the memory orders that were meant, and a C interface that Python's declarations fit."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scalemoe.ops.transports import cuda
from tests.ops.transports.emulated import SOURCES

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))
import cuda_resources as resources

NVCC = resources.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDA_HOME or PATH)")
ARCH = "90"
CTYPES = {"int32_t": ctypes.c_int32, "int": ctypes.c_int32, "int64_t": ctypes.c_int64, "cudaStream_t": ctypes.c_void_p}
# Instructions that each kernel must have; `wait_peers` polls, pushes release, rows bypass L1.
INSTRUCTIONS = {
    "dispatch_push": {"ld.global.nc.L1::no_allocate.v4.u32", "st.global.L1::no_allocate.v4.u32", "st.release.sys.global.u32"},
    "reduce_push": {"ld.global.nc.L1::no_allocate.v4.u32", "st.release.sys.global.u32", "atom.add.acq_rel.gpu.global.u32"},
    "exchange_counts": {"st.release.sys.global.u32", "ld.acquire.sys.global.u32"},
    "wait_peers": {"ld.acquire.sys.global.u32", "mov.u64 %globaltimer", "nanosleep.u32"},
    "expand": {"ld.global.nc.L1::no_allocate.v4.u32", "st.global.L1::no_allocate.v4.u32"},
}


@needs_nvcc
def test_no_kernel_spills():
    found = resources.compile_for(ARCH, NVCC)
    assert {r.kernel.split("<")[0] for r in found} == set(resources.threads_of_kernels())
    assert len(found) == 12  # with one of each dtype for the two that sum
    assert [(r.kernel, r.spills, r.stack) for r in found if r.spills or r.stack] == []
    print(resources.table(found))


def test_spills_are_noticed():
    report = """ptxas info    : Compiling entry function '_ZN8scalemoe7restoreINS_4Bf16EEEvNS_8ExchangeE' for 'sm_90'
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 72 bytes smem"""
    assert resources.parse(report) == [resources.Resources("restore<Bf16>", "90", registers=80, shared=72, stack=8, spills=16)]


@needs_nvcc
def test_kernels_have_the_instructions_that_were_meant(tmp_path):
    target = tmp_path / "kernels.ptx"
    command = [NVCC, "-O3", "-std=c++17", f"-arch=compute_{ARCH}", "-ptx", str(SOURCES / "cuda" / "launch.cu"), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    entries = re.split(r"\.entry ", target.read_text())[1:]
    for kernel, instructions in INSTRUCTIONS.items():
        bodies = [re.sub(r"mov\.u64 \t?%rd\d+, ", "mov.u64 ", entry) for entry in entries if kernel in entry.split("(")[0]]
        assert bodies
        for body in bodies:
            assert {i for i in instructions if i not in body} == set(), kernel


def declarations() -> dict[str, list]:
    """Argument types of each C function, as ctypes."""
    code = (SOURCES / "cuda" / "launchers.h").read_text()
    found = {}
    for name, arguments in re.findall(r"SCALEMOE_API .*?scalemoe_cuda_(\w+)\(([^)]*)\)", code):
        types = [re.sub(r"\s*\w+$", "", argument.strip()) for argument in arguments.split(",") if argument.strip()]
        found[name] = [ctypes.c_void_p if "*" in of_c else CTYPES[of_c] for of_c in types]
    return found


def test_python_declares_the_arguments_that_c_has():
    class Function:
        argtypes = ()

    class Library(dict):
        def __getattr__(self, name):
            return self.setdefault(name.removeprefix("scalemoe_cuda_"), Function())

    library = Library()
    cuda._declared(library)
    in_c = declarations()
    assert len(in_c) == 11
    assert {name: list(function.argtypes) for name, function in library.items()} == in_c


def test_limits_are_those_of_the_kernels():
    code = (SOURCES / "cuda" / "layout.h").read_text()
    constants = dict(re.findall(r"constexpr int(?:64_t)? (k\w+) = ([^;]+);", code))
    assert eval(constants["kMaxRanks"]) == cuda.MAX_RANKS
    assert eval(constants["kMaxExpertsPerToken"]) == cuda.MAX_EXPERTS_PER_TOKEN
    assert eval(constants["kMaxLocalExperts"]) == cuda.MAX_LOCAL_EXPERTS
    assert eval(constants["kMaxCountBytes"]) == cuda.MAX_COUNT_BYTES
