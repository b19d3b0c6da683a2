"""The planner's process: same answer as here, no torch in it (it asserts that itself), nothing left behind, and its death is an error."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from megatron_scalemoe.placement.replan.replan import replan
from megatron_scalemoe.topology.ports import Ports
from tests.placement.replan.test_replan import COST, OPTIONS, PORTS, start, zipf_trace


@pytest.fixture
def planner(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planner = BackgroundPlanner()
    yield planner
    planner.close()


def submit(planner: BackgroundPlanner, ports: Ports = PORTS) -> pathlib.Path:
    planner.submit(zipf_trace(0), start(), ports, COST, OPTIONS)
    return planner._directory


def test_same_plan_as_in_this_process(planner):
    """Also with a port between nodes that has no limit, as in a topology of one node."""
    ports = dataclasses.replace(PORTS, into=PORTS.into._replace(node_GBps=np.full_like(PORTS.into.node_GBps, np.inf)))
    directory = submit(planner, ports)
    assert planner.busy and planner.poll() is None
    planner.wait(timeout_s=60)
    result = planner.poll()
    here = replan(zipf_trace(0), start(), ports, COST, OPTIONS)
    assert result.plan.content_hash == here.plan.content_hash
    assert result.reason == here.reason and result.planned_us == pytest.approx(here.planned_us)
    assert not planner.busy and not directory.exists()
    assert planner.poll() is None


def test_modules_that_lie_where_training_runs_are_not_imported(planner, tmp_path, monkeypatch):
    (tmp_path / "networkx.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    submit(planner)
    planner.wait(timeout_s=60)
    assert planner.poll() is not None


def test_a_killed_process_is_an_error(planner):
    directory = submit(planner)
    planner._process.kill()
    planner.wait(timeout_s=10)
    with pytest.raises(ScaleMoEError, match="code -9"):
        planner.poll()
    assert not planner.busy and not directory.exists()


def test_a_damaged_file_is_an_error(planner, monkeypatch):
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: (damage(command[-1], "trace.npz"), started(command, **how))[1])
    submit(planner)
    planner.wait(timeout_s=30)
    with pytest.raises(ScaleMoEError, match="ended with code 1"):
        planner.poll()


def damage(directory: str, name: str) -> None:
    path = pathlib.Path(directory, name)
    path.write_bytes(path.read_bytes()[:-40])


def test_a_late_plan_is_an_error(planner):
    submit(planner)
    with pytest.raises(ScaleMoEError, match="in time"):
        planner.wait(timeout_s=0.01)
    assert not planner.busy


@pytest.mark.parametrize("when", ["answered", "at work, and its group was terminated"])
def test_it_ends_with_its_parent(tmp_path, when):
    """The parent is killed, perhaps after its process group got a SIGTERM, as in torchrun: the planner ends, and removes its files."""
    budget_s = 0.1 if when == "answered" else 60.0
    code = f"""
import dataclasses, json, signal, time
from megatron_scalemoe.placement.replan.background import BackgroundPlanner
from tests.placement.replan.test_replan import COST, OPTIONS, PORTS, start, zipf_trace
signal.signal(signal.SIGTERM, signal.SIG_IGN)
planner = BackgroundPlanner()
planner.submit(zipf_trace(0), start(), PORTS, COST, dataclasses.replace(OPTIONS, migrate=True, time_budget_s={budget_s}))
if {when == "answered"}:
    planner.wait(60)
print(json.dumps([planner._process.pid, str(planner._directory)]), flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as parent:
        pid, directory = json.loads(parent.stdout.readline())
        assert pathlib.Path(directory).exists()
        if "terminated" in when:
            os.killpg(parent.pid, signal.SIGTERM)
        parent.kill()
    deadline = time.monotonic() + 30
    while (pathlib.Path(f"/proc/{pid}").exists() or pathlib.Path(directory).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pathlib.Path(directory).exists()
