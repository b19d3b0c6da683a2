"""Launching ranks: they get their arguments, failures are told, and nothing survives the time limit or a SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_scalemoe.cli import torchrun
from megatron_scalemoe.cli.torchrun import run_ranks
from megatron_scalemoe.errors import ScaleMoEError

WORKER = """
import os, pathlib, signal, sys, time
folder, what = sys.argv[1:]
rank = os.environ["RANK"]
pathlib.Path(folder, rank).write_text(str(os.getpid()))
print("hello from rank", rank)
if what == "fail" and rank == "1":
    sys.exit("rank 1 gives up")
if what == "tell":
    from megatron_scalemoe.errors import ScaleMoEError
    from megatron_scalemoe.faults.told import tell_once
    sys.exit(tell_once(ScaleMoEError("all ranks find this")))
if what == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A module for the ranks, found through PYTHONPATH; each rank leaves its process id in a file named after it."""
    (tmp_path / "rank_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "pids").mkdir()
    return tmp_path / "pids"


def pids(folder) -> list[int]:
    return [int(text) for path in folder.iterdir() if (text := path.read_text())]


def runs(pid: int) -> bool:
    """Whether a process lives; a zombie that nobody has collected yet does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_what_all_ranks_find_is_told_once(worker, capfd):
    with pytest.raises(ScaleMoEError, match=r"^all ranks find this$"):
        run_ranks("rank_worker", [str(worker), "tell"], ranks=2, timeout=60, quiet=False)
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "find this" not in err


def test_a_failing_rank_is_an_error_that_shows_its_log(worker, capfd):
    with pytest.raises(ScaleMoEError, match="failed on 2 ranks"):
        run_ranks("rank_worker", [str(worker), "fail"], ranks=2, timeout=60, quiet=True)
    captured = capfd.readouterr()
    assert "rank 1 gives up" in captured.err
    assert captured.out == ""


def test_ranks_that_ignore_sigterm_die_at_the_time_limit(worker, capfd, monkeypatch):
    wait = subprocess.Popen.wait

    def wait_for_the_ranks(process, timeout=None):
        """The limit is over as soon as both ranks are there."""
        if timeout != 99:
            return wait(process, timeout)
        assert wait_until(lambda: len(pids(worker)) == 2, 60)
        raise subprocess.TimeoutExpired("torchrun", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_ranks)
    monkeypatch.setattr(torchrun, "GRACE_SECONDS", 1)
    with pytest.raises(ScaleMoEError, match="did not end within 99 s"):
        run_ranks("rank_worker", [str(worker), "hang"], ranks=2, timeout=99, quiet=False)
    assert not any(map(runs, pids(worker)))
    assert "hello from rank" not in capfd.readouterr().out


def test_a_terminated_command_takes_its_ranks_along(worker):
    code = "import sys\nfrom megatron_scalemoe.cli import torchrun\ntorchrun.GRACE_SECONDS = 1\n"
    code += "torchrun.run_ranks(sys.argv[1], sys.argv[2:], ranks=2, timeout=99, quiet=True)"
    command = subprocess.Popen([sys.executable, "-c", code, "rank_worker", str(worker), "hang"])
    assert wait_until(lambda: len(pids(worker)) == 2, 60)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    assert not any(map(runs, pids(worker)))
