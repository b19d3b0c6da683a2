import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.processes import default_processes, run_jobs


def square(i):
    return i * i


def pid_of(i):
    time.sleep(0.1)
    return os.getpid()


def odd_at_3(i):
    if i == 3:
        raise ScaleMoEError("layer 3 is odd", found="it")
    return i


def die(i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_whatever_runs_them(processes):
    seen = []
    results = run_jobs(square, [(i,) for i in range(5)], processes=processes, progress=lambda done, count: seen.append((done, count)))
    assert results == [0, 1, 4, 9, 16]
    assert seen == [(i, 5) for i in range(1, 6)]


def test_forked_jobs_really_run_elsewhere():
    pids = run_jobs(pid_of, [(i,) for i in range(4)], processes=2)
    assert len({*pids}) == 2 and os.getpid() not in pids


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_error_in_a_job_is_raised_here(processes):
    with pytest.raises(ScaleMoEError, match="layer 3 is odd"):
        run_jobs(odd_at_3, [(i,) for i in range(5)], processes=processes)


def test_a_process_that_dies_is_an_error_not_a_hang():
    with pytest.raises(ScaleMoEError, match="died"):
        run_jobs(die, [(0,), (1,)], processes=2)


def test_single_jobs_and_training_processes_are_not_forked(monkeypatch):
    assert default_processes(1) == 1
    monkeypatch.setitem(sys.modules, "torch", object())
    assert default_processes(100) == 1


@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_processes_end_with_their_parent_without_their_tracebacks(how):
    code = (
        "import os, time; from megatron_scalemoe.placement.processes import run_jobs\n"
        "def job(i): os.write(1, b'pid %d\\n' % os.getpid()); time.sleep(60)\n"  # in one piece: both write to one pipe
        "try: run_jobs(job, [(0,), (1,)], processes=2)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    if how == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert how == "killed" or "interrupted" in out
    assert "Traceback" not in err
    deadline = time.monotonic() + 10  # on a busy machine the children end a little later than their parent
    while time.monotonic() < deadline and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
