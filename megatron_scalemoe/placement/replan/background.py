"""The planner in a process of its own, beside training: its Python would hold the training loop's lock, and a fork of it is not safe.

`BackgroundPlanner` runs `python -m megatron_scalemoe.placement.replan.background DIR`, which reads the request in DIR and writes the reply
there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.environment import PACKAGE_PARENT
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document, write_atomically
from megatron_scalemoe.placement.processes import one_blas_thread
from megatron_scalemoe.placement.replan.policy import ReplanPolicy
from megatron_scalemoe.placement.replan.replan import Replan, ReplanOptions, replan
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan, save_plan
from megatron_scalemoe.topology.ports import Ports, PortSide
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace, save_trace
from megatron_scalemoe.version import SCHEMA_VERSION

_TRACE, _PORTS, _OLD_PLAN, _REQUEST = "trace.npz", "ports.npz", "old.json", "request.json"
_NEW_PLAN, _REPLY, _ERRORS = "new.json", "reply.json", "stderr.txt"
# Training needs the cores more than the planner does.
_NICE = 10
_POLL_S = 0.02
# A planner that takes so many times its time, and so long to start, hangs. It has few cores, and low priority.
_PATIENCE, _START_S = 20, 60.0


class BackgroundPlanner:
    """Owns at most one planning process at a time, and its files, in a directory that only this user can read."""

    def __init__(self):
        self._directory: Path | None = None
        self._process: subprocess.Popen | None = None
        self._deadline = 0.0

    @property
    def busy(self) -> bool:
        """Whether a plan was asked for and not yet taken."""
        return self._process is not None

    def submit(self, trace: RoutingTrace, old: PlacementPlan, ports: Ports, cost: CostModel, options: ReplanOptions) -> None:
        """Start `replan(...)` and return at once."""
        assert not self.busy, "one plan at a time"
        self._deadline = time.monotonic() + _PATIENCE * options.time_budget_s + _START_S
        self._directory = Path(tempfile.mkdtemp(prefix="scalemoe-plan-"))
        save_trace(trace, self._directory / _TRACE, compress=False)
        save_plan(old, self._directory / _OLD_PLAN)
        latencies = [ports.scale_up_latency_us, ports.scale_out_latency_us]
        np.savez(self._directory / _PORTS, ports.node_of_rank, *ports.into, *ports.out, latencies)  # not JSON: bandwidths may be infinite
        request = {"cost": cost.model_dump(), "options": dataclasses.asdict(options)}
        write_atomically(self._directory / _REQUEST, json.dumps({"schema_version": SCHEMA_VERSION, **request}), force=False)
        command = [sys.executable, "-m", __name__, str(self._directory)]
        with (self._directory / _ERRORS).open("w") as errors:
            # The child reads its input until the end, which comes when this process closes it, or dies. In a session of its own it is
            # spared by torchrun, which signals the whole process group of a rank: the child could not remove its files.
            self._process = subprocess.Popen(
                command, cwd=PACKAGE_PARENT, stdin=subprocess.PIPE, stdout=errors, stderr=errors, start_new_session=True
            )

    @property
    def _ended(self) -> bool:
        """Whether the process has answered, or died. After its answer it lives on, to remove its files should this process die."""
        return self._process.poll() is not None or (self._directory / _REPLY).exists()

    def poll(self) -> Replan | None:
        """The result, once; None while there is none. Raises `ScaleMoEError` with the end of what the process wrote if it failed."""
        if self._process is None:
            return None
        if not self._ended:
            if time.monotonic() > self._deadline:
                self.close()
                raise ScaleMoEError("the planner must answer in time", found=f"no plan after {_PATIENCE} times its time")
            return None
        try:
            if self._process.returncode:
                lines = (self._directory / _ERRORS).read_text(errors="replace").strip().splitlines()[-3:]
                raise ScaleMoEError(
                    f"the planner's process ended with code {self._process.returncode}", found=" / ".join(lines) or "no output"
                )
            return _read_reply(self._directory)
        finally:
            self.close()

    def wait(self, timeout_s: float) -> None:
        """Until `poll` has an answer. Raises `ScaleMoEError` after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._process is not None and not self._ended:
            if time.monotonic() > deadline:
                self.close()
                raise ScaleMoEError("the planner must answer in time", found=f"no plan after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the process, if there is one, and remove its files."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _read_reply(directory: Path) -> Replan:
    figures = read_document(directory / _REPLY).data
    names = [field.name for field in dataclasses.fields(Replan) if field.name != "plan"]
    if missing := [name for name in names if name not in figures]:
        raise ScaleMoEError("the planner's answer must be whole", found=f"no {missing[0]}", place=str(directory / _REPLY))
    return Replan(plan=load_plan(directory / _NEW_PLAN), **{name: figures[name] for name in names})


def _answer(directory: Path) -> None:
    request = read_document(directory / _REQUEST).data
    with np.load(directory / _PORTS, allow_pickle=False) as arrays:
        node_of_rank, *sides, (near_us, far_us) = (arrays[f"arr_{i}"] for i in range(8))
    into, out = PortSide(*sides[:3]), PortSide(*sides[3:])
    ports = Ports(node_of_rank=node_of_rank, into=into, out=out, scale_up_latency_us=float(near_us), scale_out_latency_us=float(far_us))
    options = ReplanOptions(**{**request["options"], "policy": ReplanPolicy(**request["options"]["policy"])})
    result = replan(load_trace(directory / _TRACE), load_plan(directory / _OLD_PLAN), ports, CostModel(**request["cost"]), options)
    assert "torch" not in sys.modules, "the planner needs no torch"
    save_plan(result.plan, directory / _NEW_PLAN)
    figures = {field.name: getattr(result, field.name) for field in dataclasses.fields(Replan) if field.name != "plan"}
    write_atomically(directory / _REPLY, json.dumps({"schema_version": SCHEMA_VERSION, **figures}), force=False)


def _die_with_parent(directory: Path) -> None:
    """End this process, and remove the files that nobody will read, when its input ends."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read: its lock would stop this process from ending after an error
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def main() -> None:
    directory = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the training loop, which then closes our input
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    one_blas_thread()
    watch = threading.Thread(target=_die_with_parent, args=(directory,), daemon=True)
    watch.start()
    _answer(directory)
    watch.join()


if __name__ == "__main__":
    main()
