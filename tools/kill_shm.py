"""Kill or stop a rank of the shared-memory transport again and again, at any moment, and check that the others notice.

    python tools/kill_shm.py --kills 500 --seed 0          (about 0.3 s for a kill on 2 cores)

Each run forks 2 to 4 ranks, which open a transport over pipes and exchange rows of random sizes, with halves that keep growing. One of them
gets SIGKILL, or SIGSTOP in every tenth run, after a random time: while they meet, while memory grows, or in the middle of an op. Then:

1. every other rank ends within 2 s (and its timeout, where the rank hangs) with an error that names the rank;
2. no rank is left, nor any shared memory: no descriptor or mapping of it in the survivors, no new name in /dev/shm;
3. the next run starts as fast as the first.

Prints a line per failed run on stderr, then a table (or, with --json, everything). Exit code 3 if a check failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import select
import signal
import statistics
import sys
import time

import torch

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.transports.shm import ShmTransport
from megatron_scalemoe.ops.transports.shm_memory import open_arena

NOTICED_LIMIT_S, START_LIMIT_S = 2.0, 5.0
STEP_TIMEOUT_S, HANG_TIMEOUT_S = 30.0, 0.5
MOST_TOKENS, HIDDEN, COLUMNS, NUM_LOCAL = 6000, 1024, 2, 2
OWN_NAMES, OTHER_TESTS = "scalemoe", "scalemoe-test-"


@dataclasses.dataclass(frozen=True)
class Kill:
    """What befalls whom, and when: seconds after all ranks have been forked, or after all are ready."""

    ranks: int
    victim: int
    signal: signal.Signals
    when_ready: bool
    delay_s: float
    seed: int


def choose_kill(seed: int) -> Kill:
    draw = random.Random(seed)
    ranks, when_ready = draw.choice((2, 3, 4)), draw.random() < 0.7
    return Kill(
        ranks=ranks,
        victim=draw.randrange(ranks),
        signal=signal.SIGSTOP if seed % 10 == 9 else signal.SIGKILL,
        when_ready=when_ready,
        delay_s=draw.uniform(0, 0.15) if when_ready else draw.uniform(0, 0.02),
        seed=seed,
    )


class Pipes:
    """One pipe for each ordered pair of ranks, by which they meet."""

    def __init__(self, ranks: int):
        self.ends = {pair: os.pipe() for pair in itertools.permutations(range(ranks), 2)}
        self.ranks = ranks

    def keep_only(self, rank: int) -> None:
        """Closes all ends that are not this rank's: the end of a rank must be the end of its pipes. -1: the parent, which has none."""
        for (source, destination), (reading, writing) in self.ends.items():
            if destination != rank:
                os.close(reading)
            if source != rank:
                os.close(writing)

    def exchange(self, rank: int, timeout_s: float, mine: object) -> list:
        """Everyone's object. Raises `ScaleMoEError` naming the rank that is gone or silent; the others learn it from this one."""
        others = [other for other in range(self.ranks) if other != rank]
        self._tell(rank, others, {"object": mine})
        gathered, gone = [mine] * self.ranks, None
        for other in others:
            message = self._hear(self.ends[other, rank][0], timeout_s)
            if gone is None and "object" not in message:
                gone = {"gone": message.get("gone", other), "how": message["how"]}
            gathered[other] = message.get("object")
        if gone:
            self._tell(rank, others, gone)
            raise ScaleMoEError(f"rank {gone['gone']} {gone['how']} while the ranks met")
        return gathered

    def _tell(self, rank: int, others: list[int], message: dict) -> None:
        for other in others:
            with contextlib.suppress(BrokenPipeError):  # its own pipe to here will tell
                os.write(self.ends[rank, other][1], json.dumps(message).encode() + b"\n")

    def _hear(self, pipe: int, timeout_s: float) -> dict:
        """The next line; a pipe's end or silence give a message without object."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], timeout_s)[0]:
                return {"how": "did not come in time"}
            byte = os.read(pipe, 1)
            if not byte:
                return {"how": "died"}
            line += byte
        return json.loads(line)


def exchange_rows(transport: ShmTransport, draw: random.Random) -> None:
    """One step of random sizes: forward, then backward. The largest halves have 24 MB."""
    ranks = transport.arena.size
    tokens = int(MOST_TOKENS ** draw.random())
    x = torch.zeros(tokens, HIDDEN)
    first = torch.arange(tokens) % (NUM_LOCAL * ranks)
    experts = torch.stack([first, (first + 1) % (NUM_LOCAL * ranks)], 1).sort(1).values.int()
    rows, row_probs, _, map = transport.dispatch(x, experts, torch.zeros(tokens, COLUMNS), NUM_LOCAL, 1)
    transport.combine(rows, map, experts, NUM_LOCAL)
    transport.combine_backward(x, map, experts, NUM_LOCAL, len(rows))
    transport.dispatch_backward(rows, row_probs, map, experts, NUM_LOCAL)


def run_rank(rank: int, kill: Kill, pipes: Pipes, report: int) -> None:
    """A rank's life: says "ready", and in the end its error and what is left of the shared memory."""
    pipes.keep_only(rank)
    timeout_s = HANG_TIMEOUT_S if kill.signal == signal.SIGSTOP else STEP_TIMEOUT_S
    draw = random.Random(kill.seed * 10 + rank)
    try:
        arena = open_arena(rank, range(kill.ranks), lambda mine: pipes.exchange(rank, timeout_s, mine), timeout_s)
        with ShmTransport(arena) as transport:
            os.write(report, b"ready\n")
            while True:
                exchange_rows(transport, draw)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".replace("\n", ";")
        os.write(report, json.dumps({"error": text, "time_s": time.monotonic(), "left": _shared_memory()}).encode() + b"\n")


def _shared_memory() -> list[str]:
    """This process's mappings and descriptors of the transport's memory."""
    with open("/proc/self/maps") as maps:
        found = [line.split()[-2] for line in maps if f"memfd:{OWN_NAMES}" in line]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += [target for target in [os.readlink(f"/proc/self/fd/{fd}")] if f"memfd:{OWN_NAMES}" in target]
    return found


class Reports:
    """What the ranks write, until all pipes have ended."""

    def __init__(self, pipes: list[int]):
        self.pipes = dict(enumerate(pipes))
        self.text = dict.fromkeys(self.pipes, b"")

    def read(self, until_s: float, done) -> bool:
        """Reads until `done()`; False if that takes too long, or nobody is left to write."""
        while not done():
            left_s = until_s - time.monotonic()
            open_pipes = list(self.pipes.values())
            if left_s <= 0 or not open_pipes:
                return False
            for rank in [rank for rank, pipe in self.pipes.items() if pipe in select.select(open_pipes, [], [], left_s)[0]]:
                data = os.read(self.pipes[rank], 65536)
                self.text[rank] += data
                if not data:
                    os.close(self.pipes.pop(rank))
        return True

    def ready(self) -> bool:
        return all(text.startswith(b"ready") for text in self.text.values())

    def last(self, rank: int) -> dict | None:
        lines = [line for line in self.text[rank].splitlines() if line.startswith(b"{")]
        return json.loads(lines[-1]) if lines else None


def run_kill(kill: Kill) -> dict:
    """One run: the kill, how long the others took to notice and in which op, how long the start took, and what was wrong."""
    names_before, pipes = _names(), Pipes(kill.ranks)
    report_pipes = [os.pipe() for _ in range(kill.ranks)]
    start_s, children = time.monotonic(), []
    for rank in range(kill.ranks):
        pid = os.fork()
        if pid == 0:
            for number, (reading, writing) in enumerate(report_pipes):
                os.close(reading)
                if number != rank:
                    os.close(writing)
            try:
                run_rank(rank, kill, pipes, report_pipes[rank][1])
            finally:
                os._exit(0)
        children.append(pid)
    pipes.keep_only(-1)
    for _, writing in report_pipes:
        os.close(writing)
    reports = Reports([reading for reading, _ in report_pipes])
    faults = []
    try:
        started_s = None
        if kill.when_ready:
            if not reports.read(start_s + START_LIMIT_S, reports.ready):
                faults.append(f"the ranks did not start within {START_LIMIT_S} s")
            started_s = time.monotonic() - start_s
        time.sleep(kill.delay_s)
        os.kill(children[kill.victim], kill.signal)
        killed_s = time.monotonic()
        survivors = [rank for rank in range(kill.ranks) if rank != kill.victim]
        limit_s = NOTICED_LIMIT_S + (HANG_TIMEOUT_S if kill.signal == signal.SIGSTOP else 0)
        reports.read(killed_s + limit_s, lambda: all(reports.last(rank) for rank in survivors))
        faults += itertools.chain.from_iterable(survivor_faults(rank, reports.last(rank), kill) for rank in survivors)
    finally:
        faults += _end(children, survivors, killed_s + limit_s)
        for pipe in reports.pipes.values():
            os.close(pipe)
    faults += [f"left in /dev/shm: {name}" for name in _names() - names_before]
    found = [report for report in map(reports.last, survivors) if report]
    noticed_s = max((report["time_s"] - killed_s for report in found), default=None)
    return {**dataclasses.asdict(kill), "noticed_s": noticed_s, "started_s": started_s, "moment": _moment(found), "faults": faults}


def survivor_faults(rank: int, report: dict | None, kill: Kill) -> list[str]:
    """What is wrong with the end of a rank that was not killed."""
    if report is None:
        return [f"rank {rank} did not end in time"]
    how = ("died",) if kill.signal == signal.SIGKILL else ("did not come",)
    named = report["error"].startswith("ScaleMoEError: ") and any(f"rank {kill.victim} {word}" in report["error"] for word in how)
    return ([] if named else [f"rank {rank}: {report['error']}"]) + [f"rank {rank} still has {name}" for name in report["left"]]


def _moment(reports: list[dict]) -> str:
    """Where the survivors were, as their errors say."""
    errors = [report["error"] for report in reports]
    if any("while the ranks met" in error for error in errors):
        return "bootstrap"
    return next((found[1] for found in (re.search(r"noticed by rank \d+ in (\w+)", error) for error in errors) if found), "unknown")


def _end(children: list[int], survivors: list[int], until_s: float) -> list[str]:
    """Waits for the survivors to exit by themselves; kills what is left."""
    faults, alive = [], set(survivors)
    while alive and time.monotonic() < until_s + 0.5:
        alive -= {rank for rank in alive if os.waitpid(children[rank], os.WNOHANG)[0]}
        time.sleep(0.002)
    for rank in range(len(children)):
        if rank in alive or rank not in survivors:
            faults += [f"process of rank {rank} left"] if rank in alive else []
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
    return faults


def _names() -> set[str]:
    """The transport would have no name in /dev/shm, if it had any, other than these."""
    return {name for name in os.listdir("/dev/shm") if OWN_NAMES in name and not name.startswith(OTHER_TESTS)}


def table(rows: list[dict]) -> str:
    by_moment = collections.defaultdict(list)
    for row in rows:
        by_moment[signal.Signals(row["signal"]).name, row["moment"]].append(row)
    lines = []
    for (name, moment), group in sorted(by_moment.items()):
        noticed_ms = [1e3 * row["noticed_s"] for row in group if row["noticed_s"] is not None] or [float("nan")]
        failed = sum(bool(row["faults"]) for row in group)
        lines.append([name, moment, len(group), f"{statistics.median(noticed_ms):.0f}", f"{max(noticed_ms):.0f}", failed])
    started_ms = [1e3 * row["started_s"] for row in rows if row["started_s"] is not None] or [float("nan")]
    failed = sum(bool(row["faults"]) for row in rows)
    head = format_table(["signal", "in", "runs", "median ms to the error", "longest", "failed"], lines)
    starts = f"start of the ranks: median {statistics.median(started_ms):.0f} ms, longest {max(started_ms):.0f} ms"
    return f"{head}\n\n{len(rows)} runs, {failed} failed; {starts}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others follow")
    add_output_flags(parser)
    args = parser.parse_args()
    try:
        check_output(args.output, force=args.force)
        if native.cpu() is None:
            raise ScaleMoEError("this needs the native CPU library", found=native.why_not("cpu"))
        torch.set_num_threads(1)  # a forked child has none of the parent's threads
        rows = []
        for seed in range(args.seed, args.seed + args.kills):
            rows.append(run_kill(choose_kill(seed)))
            if rows[-1]["faults"]:
                print(f"seed {seed}: {'; '.join(rows[-1]['faults'])}", file=sys.stderr, flush=True)
        emit(args, {"seed": args.seed, "kills": rows}, table(rows))
    except ScaleMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return CHECK_FAILED if any(row["faults"] for row in rows) else OK


if __name__ == "__main__":
    sys.exit(main())
