import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.processes import default_processes, run_jobs


def soon():
    return time.monotonic() + 5


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_order_whatever_runs_them(processes):
    seen = []
    results = run_jobs(
        lambda i, seconds: i * i, 5, deadline=soon(), processes=processes, progress=lambda done, count: seen.append((done, count))
    )
    assert results == [0, 1, 4, 9, 16]
    assert seen == [(i, 5) for i in range(1, 6)]


def test_each_job_gets_an_equal_share_of_what_is_left():
    shares = run_jobs(lambda i, seconds: seconds, 4, deadline=time.monotonic() + 8, processes=1)
    assert shares == pytest.approx([2.0, 8 / 3, 4.0, 8.0], abs=0.2)  # nobody used any
    assert run_jobs(lambda i, seconds: seconds, 2, deadline=time.monotonic() - 1, processes=1) == [0.0, 0.0]


def test_forked_jobs_really_run_elsewhere():
    pids = run_jobs(lambda i, seconds: os.getpid(), 4, deadline=soon(), processes=2)
    assert pids[0] == pids[2] != pids[1] == pids[3]
    assert os.getpid() not in pids


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_error_in_a_job_is_raised_here(processes):
    def job(i, seconds):
        if i == 3:
            raise ScaleMoEError("layer 3 is odd", found="it")
        return i

    with pytest.raises(ScaleMoEError, match=r"layer 3 is odd\n  found: it"):
        run_jobs(job, 5, deadline=soon(), processes=processes)


def test_a_process_that_dies_is_an_error_not_a_hang():
    with pytest.raises(ScaleMoEError, match=r"died\n  found: exit code -9"):
        run_jobs(lambda i, seconds: os.kill(os.getpid(), signal.SIGKILL), 2, deadline=soon(), processes=2)


def test_short_work_single_jobs_and_training_processes_are_not_forked(monkeypatch):
    assert default_processes(100, 0.01) == 1
    assert default_processes(1, 100.0) == 1
    monkeypatch.setitem(sys.modules, "torch", object())
    assert default_processes(100, 100.0) == 1


def test_ctrl_c_ends_parent_and_children_without_their_tracebacks():
    code = (
        "import os, time; from megatron_scalemoe.placement.processes import run_jobs\n"
        "def job(i, s): os.write(1, b'pid %d\\n' % os.getpid()); time.sleep(60)\n"  # in one piece: both write to one pipe
        "try: run_jobs(job, 2, deadline=time.monotonic() + 60, processes=2)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert "interrupted" in out
    assert "Traceback" not in err
    deadline = time.monotonic() + 10  # on a busy machine the children end a little later than their parent
    while time.monotonic() < deadline and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
