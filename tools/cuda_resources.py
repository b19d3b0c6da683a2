"""What each CUDA kernel needs on each architecture: registers, shared memory, spills, and how many of its blocks fit on a multiprocessor.

Compiles csrc/cuda with nvcc, as setup.py does, and needs no GPU. Fails if any kernel spills registers or has a stack frame:

    python tools/cuda_resources.py [--archs 80 90 100]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "launch.cu"
ARCHS = ("80", "90", "100")
REGISTERS, MAX_THREADS = 65536, 2048  # of a multiprocessor, on all three


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture; bytes but for the registers of a thread."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def main() -> int:
    args = _parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc (CUDA_HOME or PATH)", file=sys.stderr)
        return 2
    found = [resources for arch in args.archs for resources in compile_for(arch, nvcc)]
    print(table(found))
    spilling = [f"{r.kernel} for sm_{r.arch}" for r in found if r.spills or r.stack]
    if spilling:
        print(f"registers spill, or a stack frame is needed: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling or not found else 0


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc") if home else shutil.which("nvcc")


def compile_for(arch: str, nvcc: str, source: Path = SOURCE) -> list[Resources]:
    """Resources of all kernels of `source`, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin", str(source), "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return sorted(parse(result.stderr), key=lambda r: r.kernel)


def parse(report: str) -> list[Resources]:
    """Resources from what `ptxas -v` writes."""
    found = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        name, arch = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
        )
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        found.append(Resources(_readable(name), arch, registers, int(shared[1]) if shared else 0, stack, stores + loads))
    return found


def _readable(mangled: str) -> str:
    """restore<Bf16> from its mangled name, of which all parts are preceded by their lengths."""
    parts, rest = [], mangled
    while match := re.search(r"\d+", rest):
        start = match.end()
        name = rest[start : start + int(match[0])]
        parts.append(name)
        rest = rest[start + int(match[0]) :]
    kernel, *others = parts[1:]
    template = re.search(rf"{kernel}I", mangled)
    return f"{kernel}<{others[1] if others[0] == 'scalemoe' else others[0]}>" if template else kernel


def table(found: list[Resources], source_folder: Path = SOURCE.parent) -> str:
    threads = threads_of_kernels(source_folder)
    lines = [f"{'kernel':24} {'sm':>4} {'registers':>9} {'shared B':>8} {'stack B':>7} {'spills B':>8} {'threads':>7} {'blocks/SM':>9}"]
    for r in found:
        of_kernel = threads[r.kernel.split("<")[0]]
        blocks = min(REGISTERS // (-(-r.registers // 8) * 8 * of_kernel), MAX_THREADS // of_kernel, 32)
        lines.append(f"{r.kernel:24} {r.arch:>4} {r.registers:9} {r.shared:8} {r.stack:7} {r.spills:8} {of_kernel:7} {blocks:9}")
    return "\n".join(lines)


def threads_of_kernels(source_folder: Path = SOURCE.parent) -> dict[str, int]:
    """Threads of a block of each kernel, from the kernels' own bounds."""
    code = "".join(path.read_text() for path in sorted(source_folder.glob("*.h")))
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", code)}
    return {kernel: constants[name] for name, kernel in re.findall(r"SCALEMOE_KERNEL\((\w+)\)\s*(\w+)\(", code)}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHS, metavar="SM")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
