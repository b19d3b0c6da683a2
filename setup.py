"""Takes the version from version.py and builds the native libraries from csrc/. Everything else stands in pyproject.toml.

What can be built is built: with a C++ compiler (CXX, g++ or c++) the CPU library, with nvcc the CUDA library too. Neither needs torch. A
library that could not be built is left out, with the reason in megatron_scalemoe/ops/lib/build.json, where `scalemoe doctor` reads it.

SCALEMOE_BUILD_CUDA=auto|0|1: 0 never builds CUDA, 1 fails without it. TORCH_CUDA_ARCH_LIST: as in PyTorch, e.g. "9.0" or "8.0;9.0+PTX".
"""

import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "megatron_scalemoe.ops.lib"
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


def main() -> None:
    libraries = [Library(kind, compiler) for kind, compiler in (("cpu", find_cxx()), ("cuda", find_nvcc())) if compiler]
    setup(
        version=runpy.run_path(str(ROOT / "megatron_scalemoe" / "version.py"))["__version__"],
        ext_modules=libraries,
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )


class Library(Extension):
    """A shared library for ctypes, not a Python module."""

    def __init__(self, kind: str, compiler: str):
        self.kind, self.compiler = kind, compiler
        super().__init__(f"{PACKAGE}.libscalemoe_{kind}", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / kind).iterdir()))
        self.optional = not (kind == "cuda" and cuda_wanted() == "1")


class BuildLibraries(build_ext):
    """Compiles each library with one command, and writes down what came of it."""

    def run(self) -> None:
        self.outcomes = {kind: {"built": False, "why_not": reason} for kind, reason in (("cpu", "no C++ compiler"), ("cuda", no_cuda()))}
        in_checkout = self.inplace or self.editable_mode
        directory = (ROOT if in_checkout else Path(self.build_lib)) / PACKAGE.replace(".", "/")
        directory.mkdir(parents=True, exist_ok=True)
        super().run()
        (directory / "build.json").write_text(json.dumps({"schema_version": 1, **self.outcomes}, indent=1) + "\n")
        for kind, outcome in self.outcomes.items():
            said = f"built in {outcome['time_s']} s by {outcome['compiler']}" if outcome["built"] else f"not built: {outcome['why_not']}"
            print(f"scalemoe native {kind}: {said}", file=sys.stderr)

    def build_extension(self, ext: Library) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = (cxx_command if ext.kind == "cpu" else nvcc_command)(ext.compiler, target)
        start = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(result.stdout + result.stderr)
        if result.returncode == 0:
            self.outcomes[ext.kind] = {"built": True, "compiler": ext.compiler, "time_s": round(time.monotonic() - start, 1)}
            return
        message = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()
        self.outcomes[ext.kind] = {"built": False, "why_not": f"{ext.compiler} failed: {message[0]}"}
        if not ext.optional:
            raise SystemExit(f"SCALEMOE_BUILD_CUDA=1, but {ext.compiler} failed:\n" + "\n".join(message))

    def get_ext_filename(self, ext_name: str) -> str:
        return ext_name.replace(".", "/") + ".so"


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, not on Python's version or ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        return "py3", "none", system


def find_cxx() -> str | None:
    if platform.system() != "Linux":
        return None  # shared memory between ranks uses memfd and futex
    return next((found for name in (os.environ.get("CXX"), "g++", "c++") if name and (found := shutil.which(name))), None)


def cuda_wanted() -> str:
    wanted = os.environ.get("SCALEMOE_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SCALEMOE_BUILD_CUDA must be auto, 0 or 1, not {wanted!r}")
    return wanted


def find_nvcc() -> str | None:
    if cuda_wanted() == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None and cuda_wanted() == "1":
        raise SystemExit(f"SCALEMOE_BUILD_CUDA=1, but there is no nvcc (looked for {', '.join(places)}; CUDA_HOME names another place)")
    return found


def no_cuda() -> str:
    return "SCALEMOE_BUILD_CUDA=0" if cuda_wanted() == "0" else "no nvcc (CUDA_HOME or PATH)"


def cxx_command(cxx: str, target: Path) -> list[str]:
    sources = sorted(map(str, (ROOT / "csrc" / "cpu").glob("*.cpp")))
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
    return [cxx, *flags, source_hash("cpu"), *sources, "-o", str(target)]


def nvcc_command(nvcc: str, target: Path) -> list[str]:
    sources = sorted(map(str, (ROOT / "csrc" / "cuda").glob("*.cu")))
    flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared", "-cudart", "static", "--threads", "0"]
    return [
        nvcc,
        *flags,
        *gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS),
        source_hash("cuda"),
        *sources,
        "-o",
        str(target),
    ]


def source_hash(kind: str) -> str:
    """The definition by which `ops.native` notices a library built from other sources than the checkout's."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc" / kind).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f'-DSCALEMOE_SOURCE_HASH="{digest.hexdigest()[:16]}"'


def gencode(archs: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0a 10.0+PTX"."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0 or 9.0+PTX, not {arch!r}")
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


main()
