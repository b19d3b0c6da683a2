"""Plants small mistakes in a copy of the checkout, one at a time, and runs the tests that should notice: do the tests test anything?

    python tools/mutations.py [NAME ...] [--list] [--unchanged] [--jobs N]

The mistakes are in tests/mutations.yaml: `before`, a piece of `file` that is there exactly once, becomes `after`; `tests` are pytest's
arguments. Exit code 3 if one survives or cannot be planted. A test that only hangs has not noticed anything, nor has a failed import.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
BUILD = "g++ -O2 -std=c++17 -fPIC -shared -fvisibility=hidden -pthread"
# What pytest's exit codes say about a mistake.
OUTCOMES = {0: "SURVIVED", 1: "caught", 5: "NO TESTS"}


class Mutation(NamedTuple):
    """what: the mistake in words, so that it can be planted again where the code has changed."""

    name: str
    what: str
    file: str
    before: str
    after: str
    tests: str


class Result(NamedTuple):
    mutation: Mutation
    outcome: str
    seconds: float
    detail: str


def main() -> int:
    options = _parsed()
    mutations = [Mutation(**entry) for entry in yaml.safe_load(options.mutations.read_text(encoding="utf-8"))]
    unknown = set(options.names) - {mutation.name for mutation in mutations}
    if unknown:
        print(f"error: no mutations named {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutation for mutation in mutations if not options.names or mutation.name in options.names]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name}: {mutation.file}: {mutation.what}")
        return 0
    if options.unchanged:
        chosen = list({mutation.tests: mutation._replace(after=mutation.before) for mutation in chosen}.values())
    good = "SURVIVED" if options.unchanged else "caught"
    results = _run_all(chosen, options)
    bad = [result for result in results if result.outcome != good]
    print(f"{len(results) - len(bad)} of {len(results)} {good}, {sum(result.seconds for result in results):.0f} s")
    return 3 if bad else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutations")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    parser.add_argument("--unchanged", action="store_true", help="run the tests without any mistake: all must pass (SURVIVED)")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutation")
    parser.add_argument("--mutations", type=Path, default=ROOT / "tests" / "mutations.yaml", help="the list")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="what to copy")
    return parser.parse_args()


def _run_all(mutations: list[Mutation], options: argparse.Namespace) -> list[Result]:
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="scalemoe-mutations-", dir=folder) as parent:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            copies.put(_copied(options.checkout, Path(parent) / str(number)))

        def run(mutation: Mutation) -> Result:
            copy = copies.get()
            try:
                result = _run(mutation, copy, options.timeout)
            finally:
                copies.put(copy)
            print(f"{result.outcome:9} {mutation.name:40} {result.seconds:5.0f} s  {result.detail}", flush=True)
            return result

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as threads:
            return list(threads.map(run, mutations))


def _copied(checkout: Path, copy: Path) -> Path:
    """The files that git knows or would take, and the built libraries."""
    names = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (checkout / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / name, copy / name, follow_symlinks=False)
    libraries = Path("megatron_scalemoe/ops/lib")
    shutil.copytree(checkout / libraries, copy / libraries, dirs_exist_ok=True)
    return copy


def _run(mutation: Mutation, copy: Path, timeout_s: float) -> Result:
    file, began = copy / mutation.file, time.monotonic()
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = source.count(mutation.before)
    if found != 1:
        return Result(mutation, "NOT FOUND", 0.0, f"`before` is {found} times in {mutation.file}")
    file.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        outcome, detail = _test(mutation, copy, timeout_s)
    finally:
        file.write_text(source, encoding="utf-8")
    return Result(mutation, outcome, time.monotonic() - began, detail)


def _test(mutation: Mutation, copy: Path, timeout_s: float) -> tuple[str, str]:
    # No bytecode: what has the same size and was written in the same second is taken for the same source.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    if mutation.file.startswith("csrc/cpu/"):
        library = copy / "mutated" / "libscalemoe_cpu.so"
        library.parent.mkdir(exist_ok=True)
        sources = map(str, sorted((copy / "csrc" / "cpu").glob("*.cpp")))
        subprocess.run([*BUILD.split(), '-DSCALEMOE_SOURCE_HASH="mutated"', *sources, "-o", str(library)], check=True)
        environment["SCALEMOE_LIBRARY_DIR"] = str(library.parent)
    command = [*PYTEST, *shlex.split(mutation.tests)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A session of its own, so that a timeout ends the ranks, too.
    process = subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "HANGS", mutation.tests
    last = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))] or output.splitlines()[-1:]
    return OUTCOMES.get(process.returncode, "BROKEN"), last[0][:150] if last else ""


if __name__ == "__main__":
    sys.exit(main())
