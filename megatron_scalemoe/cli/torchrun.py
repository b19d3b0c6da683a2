"""Runs a module on several local ranks, within a hard time limit, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_scalemoe.environment import PACKAGE_PARENT, usable_cores
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.told import TOLD_FILE

# After SIGTERM torchrun passes the signal on to its ranks; this is how long they get before SIGKILL.
GRACE_SECONDS = 5
LOG_TAIL_BYTES = 8000
# torchrun without its own traceback below what the ranks have said.
_LAUNCHER = """
import logging, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    run(parse_args(sys.argv[1:]))
except ChildFailedError as error:
    sys.exit(abs(error.get_first_failure()[1].exitcode) or 1)
"""


def result_of_ranks(module: str, arguments: list[str], *, ranks: int, timeout: float, quiet: bool) -> dict:
    """What the ranks wrote as JSON to the `--result-file` that they get besides `arguments`; otherwise as `run_ranks`."""
    with tempfile.TemporaryDirectory(prefix="scalemoe-") as folder:
        result_file = Path(folder) / "result.json"
        run_ranks(module, [*arguments, "--result-file", str(result_file)], ranks=ranks, timeout=timeout, quiet=quiet)
        return json.loads(result_file.read_text(encoding="utf-8"))


def run_ranks(module: str, arguments: list[str], *, ranks: int, timeout: float, quiet: bool) -> None:
    """Runs `python -m module arguments` on `ranks` ranks; paths in `arguments` are absolute. Raises `ScaleMoEError` if they fail or take
    longer than `timeout` seconds.

    The ranks' output goes to stderr; with `quiet` only the end of it, and only after a failure.
    """
    command = [sys.executable, "-c", _LAUNCHER, "--standalone", "--nproc_per_node", str(ranks), "-m", module, *arguments]
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)), **os.environ}
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="scalemoe-told-") as folder:
        told = Path(folder) / "error"
        environment[TOLD_FILE] = str(told)
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=PACKAGE_PARENT,
            stdin=subprocess.DEVNULL,
            stdout=log if quiet else sys.stderr,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _killed_at_exit(process):
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
        if code == 0:
            return
        if told.exists():
            raise ScaleMoEError(told.read_text(encoding="utf-8"))
        if quiet:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            print(log.read().decode(errors="replace"), file=sys.stderr)
    if code is None:
        raise ScaleMoEError(f"{module} did not end within {timeout:g} s; all ranks were stopped", try_="a longer --timeout, or less work")
    raise ScaleMoEError(f"{module} failed on {ranks} ranks", found=f"exit code {code}", try_="the ranks' own messages are above")


@contextmanager
def _killed_at_exit(process: subprocess.Popen) -> Iterator[None]:
    def interrupt(signum: int, _frame: object) -> None:
        raise SystemExit(128 + signum)

    # Being told to stop must not skip the clean-up: the launcher has a session of its own and would live on.
    signals = (signal.SIGTERM, signal.SIGHUP)
    previous = {s: signal.signal(s, interrupt) for s in signals}
    try:
        yield
    finally:
        if process.poll() is None:
            _kill_tree(process)
        for s, handler in previous.items():
            signal.signal(s, handler)


def _kill_tree(process: subprocess.Popen) -> None:
    # torchrun gives each rank a session of its own, so killing the launcher's process group alone would leave the ranks running.
    import psutil

    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=GRACE_SECONDS)
    for rank in alive:
        rank.kill()
    try:
        process.wait(GRACE_SECONDS)  # it ends by itself once its ranks are gone
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
