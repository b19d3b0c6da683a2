"""Ranks without the seconds that importing Megatron takes: a server has imported it, and forks them. For runs of the examples' scripts.

python forked_ranks.py SOCKET                           the server
python -S forked_ranks.py SOCKET RANKS SCRIPT FLAG ...  one run, in torchrun's place; {rank} in a flag becomes the rank
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # all ranks are CPU ranks, as Megatron was imported for them


class Server:
    """A running server. command: what starts ranks with it, before RANKS SCRIPT FLAG ..."""

    def __init__(self, folder: Path):
        address = folder / "socket"
        environment = os.environ | NO_GPU
        self.process = subprocess.Popen([sys.executable, __file__, str(address)], env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while not address.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self.command = [sys.executable, "-S", __file__, str(address)]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(address: str) -> None:
    """Until the process that started it is gone."""
    parent = os.getppid()
    _import_megatron()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        server.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    os.waitpid(_fork(_run, connection), 0)


def _import_megatron() -> None:
    """All but the examples' own modules: those are a run's, which may be of another checkout."""
    from megatron_scalemoe.mcore import cpu_ranks

    cpu_ranks.install()
    common = str(Path(__file__).resolve().parents[2] / "examples" / "common")
    sys.path.insert(0, common)
    import training  # noqa: F401

    sys.path.remove(common)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(common):
            del sys.modules[name]


def _fork(function: Callable[..., int], *args) -> int:
    """Id of a process that ends with the function's exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = function(*args)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(connection: socket.socket) -> int:
    message, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    job = json.loads(message)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(job["environment"] | NO_GPU, WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    os.chdir(job["folder"])
    ranks = [_fork(_rank, rank, job["command"]) for rank in range(job["ranks"])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    connection.send(json.dumps(codes).encode())
    return 0


def _rank(rank: int, command: list[str]) -> int:
    import torch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.argv = [word.replace("{rank}", str(rank)) for word in command]
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")
    return 0


def run_job(address: str, ranks: int, command: list[str]) -> int:
    """1 if any rank failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"environment": dict(os.environ), "folder": os.getcwd(), "ranks": ranks, "port": port, "command": command}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(job).encode()], [1, 2])
        codes = json.loads(connection.recv(1000) or b"[1]")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]) if len(sys.argv) == 2 else run_job(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
