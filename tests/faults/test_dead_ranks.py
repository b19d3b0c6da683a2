"""A rank that dies, hangs or leaves: the others say which one, soon, and end. Real processes, real signals."""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.faults.dead_ranks import naming_dead_ranks
from tests.faults.faulty_loop import ANSWER_S, RANKS, SURVIVOR_CODE, run_rank
from tests.rank_pool import pool

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 45.0  # twice what the longest scenario takes on an idle machine
SILENT = f"died or hangs: no sign of life for {ANSWER_S:g} s"
STORE_GONE = "died, hangs or left: the job's store, which is in its process"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A fault of one rank, what the others must say, and how the victim ends (None: it stays until it is killed).

    The store is a file, or in the process of rank 0 ("tcp").
    """

    fault: str
    victim: int
    message: str
    victim_code: int | None
    store: str = "file"


SCENARIOS = {
    "killed": Scenario("SIGKILL", 2, f"rank 2 {SILENT}", -signal.SIGKILL),
    "stopped": Scenario("SIGSTOP", 1, f"rank 1 {SILENT}", None),
    "terminated": Scenario("SIGTERM", 3, "rank 3 was terminated by SIGTERM", 128 + signal.SIGTERM),
    "raised": Scenario("raise", 0, "rank 0 left after ValueError: a bug of the user", 1),
    "finished early": Scenario("finish", 2, "rank 2 has finished", 0),
    "busy elsewhere": Scenario("sleep", 2, "rank 2 is alive, but did not come to the collective", 1),
    "killed, TCP store": Scenario("SIGKILL", 3, f"rank 3 {SILENT}", -signal.SIGKILL, store="tcp"),
    "killed with the store": Scenario("SIGKILL", 0, f"rank 0 {STORE_GONE}", -signal.SIGKILL, store="tcp"),
    "stopped with the store": Scenario("SIGSTOP", 0, f"rank 0 {STORE_GONE}", None, store="tcp"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    codes: list[int | None]
    outputs: list[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """All scenarios, played at the same time: their ranks mostly sleep."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.faulty_loop"])
    directories = {name: tmp_path_factory.mktemp("ranks") for name in SCENARIOS}
    started = {name: start(context, scenario, directories[name]) for name, scenario in SCENARIOS.items()}
    try:
        deadline = time.monotonic() + LIMIT_S
        for name, scenario in SCENARIOS.items():
            for rank, process in enumerate(started[name]):
                if rank != scenario.victim or scenario.victim_code is not None:
                    process.join(max(0.0, deadline - time.monotonic()))
        codes = {name: [process.exitcode for process in processes] for name, processes in started.items()}
    finally:
        for process in (process for processes in started.values() for process in processes):
            process.kill()
            process.join()
    return {name: Outcome(codes[name], [log_of(directories[name], rank).read_text() for rank in range(RANKS)]) for name in SCENARIOS}


def start(context, scenario: Scenario, directory: Path) -> list:
    method = f"file://{directory / 'store'}" if scenario.store == "file" else f"tcp://127.0.0.1:{free_port()}"
    arguments = [(rank, method, scenario.fault, scenario.victim, log_of(directory, rank)) for rank in range(RANKS)]
    processes = [context.Process(target=run_rank, args=values, daemon=True) for values in arguments]
    for process in processes:
        process.start()
    return processes


def log_of(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.log"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("name", SCENARIOS)
def test_survivors_name_the_rank_and_end(name, outcomes):
    scenario, outcome = SCENARIOS[name], outcomes[name]
    assert outcome.codes[scenario.victim] == scenario.victim_code, outcome.outputs[scenario.victim]
    for rank in sorted(set(range(RANKS)) - {scenario.victim}):
        output = outcome.outputs[rank]
        assert outcome.codes[rank] == SURVIVOR_CODE, f"rank {rank}:\n{output}"
        assert scenario.message in output
        assert output.count("try:") == 1, "one message, once"


def test_the_users_own_error_is_not_masked(outcomes):
    assert "ValueError: a bug of the user" in outcomes["raised"].outputs[0]
    assert "ScaleMoEError" not in outcomes["raised"].outputs[0]


def test_a_busy_rank_says_where_it_hangs(outcomes):
    output = outcomes["busy elsewhere"].outputs[2]
    assert "still blocked here" in output
    assert "time.sleep(1000)" in output


def test_in_torchrun_everybody_ends_with_the_message():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command = [*launcher, "-m", "tests.faults.faulty_loop", "SIGKILL", "1"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    descendants: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            descendants.update(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.2)
        output = process.communicate(timeout=1)[0]
    finally:
        _, left = psutil.wait_procs(descendants, timeout=1)
        for each in [*left, process]:
            each.kill()
    assert process.returncode == 1
    assert output.count(f"rank 1 {SILENT}") == RANKS - 1, output
    assert len(descendants) >= RANKS
    assert not left


def reduce_and_raise(error: Exception) -> None:
    with naming_dead_ranks(1.0):
        dist.all_reduce(torch.ones(1))
        raise error


def other_failures_pass() -> bool:
    """Errors that no lost rank is to blame for come out of the context as they are, and SIGTERM is as before."""
    for error in (ValueError("x"), RuntimeError("out of memory"), RuntimeError("[gloo/transport/tcp/pair.cc:1] Read error")):
        with pytest.raises(type(error)) as raised:
            reduce_and_raise(error)
        assert raised.value is error
    with naming_dead_ranks(1.0):
        dist.all_reduce(torch.ones(1))
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_failures_pass_and_the_context_can_be_used_again():
    assert all(pool(2).run(other_failures_pass))


def child_ended_by_sigterm() -> int:
    """Which signal ends a process that was forked inside the context; this one must not think that it was meant."""
    with naming_dead_ranks(1.0):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(1.0)
        dist.barrier()
    return os.WTERMSIG(status)


def test_a_forked_child_can_be_terminated():
    assert pool(2).run(child_ended_by_sigterm) == [signal.SIGTERM] * 2
