"""Kill a rank of a training with live balance again and again, resume it, and check that nothing is lost.

    python tools/kill_campaign.py --kills 50 --seed 0          (about 30 s for a kill on 2 cores; needs the train extra)

One training of examples/gpt_moe on 2 CPU ranks, with replicas and homes that move to random places every 5 iterations (`kill_hooks.py`),
is killed and resumed until all kills are done, then trained on undisturbed. Each kill is SIGKILL for one rank, at a random occurrence of
one of the moments of a step, replan, migration, save or load, or anywhere. After each kill:

1. the other rank named the dead one, the job ended in time, and none of its processes and planner directories is left;
2. the restart goes on from the iteration that the checkpoint directory's tracker names, which is the last one that was complete;
3. that checkpoint holds every logical expert, and its optimizer state, once, equal to those of stock Megatron's run at that iteration;
4. the loss of every iteration is that of stock Megatron's undisturbed run on the same batches.

Prints a line per kill on stderr, then a table (or, with --json, everything). Exit code 3 if a check failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import kill_checks as checks
import psutil

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.directory import iteration_path, latest_iteration

TOOLS = Path(__file__).resolve().parent
SCRIPT = TOOLS.parent / "examples" / "gpt_moe" / "pretrain_gpt.py"
RANKS, LAYERS, EXPERTS, SAVE_INTERVAL = 2, 2, 8, 10
MODEL = f"""--num-layers {LAYERS} --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts {EXPERTS}
    --micro-batch-size 2 --global-batch-size 8 --expert-model-parallel-size {RANKS} --lr 1e-3 --lr-decay-style constant --lr-warmup-iters 2
    --log-interval 1 --eval-interval 1000000 --eval-iters 1 --save-interval {SAVE_INTERVAL} --compare-iters 0
    --distributed-timeout-minutes 0.5 --device cpu""".split()
LIVE = [
    *("--moe-dispatcher", "scalemoe", "--scalemoe-replicas", "4", "--scalemoe-migrate"),
    *("--scalemoe-replan-interval", "5", "--scalemoe-trace-interval", "5"),
]
LOSS_TOLERANCE = 1e-4
# Relative to a tensor's largest value. Sums in another order are 1e-7 apart at first; different experts' moments at least 1e-3, their
# weights 0.7.
WEIGHT_TOLERANCE = 1e-3
MOST_ITERATIONS = 60  # of a run that should have been killed; the moments come long before
REFERENCE_CHUNK = 200
START_LIMIT_S, END_LIMIT_S = 300.0, 60.0
TOKEN = "SCALEMOE_KILL_CAMPAIGN"  # in the environment of all processes of a job


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one job went. killed: whether the victim was. ended_s: from the kill (0 without one) to the end of all ranks and the launcher."""

    code: int | None
    killed: bool
    ended_s: float
    log: checks.Log
    errors: dict[int, str]
    faults: list[str]


class Campaign:
    """Owns the directory with the reference run, the training that is killed, and the logs of each job."""

    def __init__(self, directory: Path):
        self.directory, self.reference, self.reference_end = directory, {}, 0
        self.save, self.reference_save = directory / "checkpoints", directory / "reference"

    def extend_reference(self, iteration: int) -> None:
        """Train stock Megatron, undisturbed, at least to this iteration."""
        if iteration <= self.reference_end:
            return
        end = iteration + REFERENCE_CHUNK
        print(f"reference run: iterations {self.reference_end + 1} to {end} with stock Megatron", file=sys.stderr, flush=True)
        flags = _flags(end, self.reference_save, resumes=self.reference_end > 0)
        outcome = self._run(f"reference-{end}", [str(SCRIPT), *flags], checks.Kill(-1, "", 0, 0.0), limit_s=3600.0)
        if outcome.code != 0:
            raise ScaleMoEError("the reference run failed", found=f"code {outcome.code}", try_=f"see {self.directory / 'logs'}")
        self.reference |= outcome.log.losses
        self.reference_end = end

    def train_until_killed(self, name: str, kill: checks.Kill) -> tuple[Outcome, list[str]]:
        """Resume, kill, and check all that the module's text promises. kill.moment "": train on to the next checkpoints instead."""
        before = latest_iteration(self.save)
        end = (before or 0) + (MOST_ITERATIONS if kill.moment else 2 * SAVE_INTERVAL)
        self.extend_reference(end)
        marker = self.directory / "killed.json"
        marker.unlink(missing_ok=True)
        aimed = "" if kill.moment == checks.ANYWHERE else kill.moment
        job = json.dumps({**dataclasses.asdict(kill), "moment": aimed, "marker": str(marker)})
        script = [str(TOOLS / "kill_hooks.py"), job, *_flags(end, self.save, resumes=before is not None), *LIVE]
        outcome = self._run(name, script, kill, limit_s=START_LIMIT_S)
        return outcome, outcome.faults + self._faults(kill, outcome, before)

    def _faults(self, kill: checks.Kill, outcome: Outcome, before: int | None) -> list[str]:
        faults = []
        if kill.moment and not outcome.killed:
            faults.append(f"the moment did not come; code {outcome.code}")
        elif kill.moment:
            faults += checks.survivor_faults(outcome.errors, kill.rank)
        if (outcome.code == 0) == bool(kill.moment):
            faults.append(f"exit code {outcome.code}")
        faults += checks.resume_faults(outcome.log, before)
        faults += checks.loss_faults(outcome.log.losses, self.reference, LOSS_TOLERANCE)
        now = latest_iteration(self.save)
        faults += checks.tracker_faults(before, now, outcome.log, SAVE_INTERVAL)
        if now is not None:
            paths = iteration_path(self.save, now), iteration_path(self.reference_save, now)
            faults += checks.checkpoint_faults(*paths, (LAYERS, EXPERTS), WEIGHT_TOLERANCE)
        return faults

    def _run(self, name: str, script: list[str], kill: checks.Kill, limit_s: float) -> Outcome:
        logs, temporary, token = self.directory / "logs" / name, self.directory / "tmp", uuid.uuid4().hex
        temporary.mkdir(exist_ok=True)
        logs.mkdir(parents=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        command = [*launcher, "--log-dir", str(logs), "--redirects", "3", "--", *script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), TOKEN: token}
        with (logs / "launcher.txt").open("w") as output:
            process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            killed_s, in_time = self._watch(process, logs, kill, limit_s)
            ended_s = time.time() - killed_s if killed_s else 0.0
            faults = [] if in_time else ["the job did not end in time"]
            faults += _leftovers(token, temporary) if in_time else []
        finally:
            for left in _processes(token):
                left.kill()
            process.wait()
            shutil.rmtree(temporary)
        log = checks.read_log(_output(logs, 0, "stdout"))
        errors = {rank: _output(logs, rank, "stderr") for rank in range(RANKS)}
        return Outcome(process.returncode, killed_s > 0, ended_s, log, errors, faults)

    def _watch(self, process: subprocess.Popen, logs: Path, kill: checks.Kill, limit_s: float) -> tuple[float, bool]:
        """Until the job ends: the time of the kill, 0 if there was none, and whether the end came in time. Kills "anywhere" itself."""
        marker, kill_at_s, killed_s = self.directory / "killed.json", 0.0, 0.0
        deadline_s = time.time() + limit_s
        while process.poll() is None:
            time.sleep(0.05)
            now_s = time.time()
            if now_s > deadline_s:
                return killed_s, False
            if killed_s:
                continue
            if kill.moment == checks.ANYWHERE and not kill_at_s:
                trained = len(checks.read_log(_output(logs, 0, "stdout")).losses)
                kill_at_s = now_s + kill.delay_s if trained >= kill.occurrence else 0.0
            if kill_at_s and now_s > kill_at_s and _kill_rank(process.pid, kill.rank):
                killed_s = now_s
            elif kill.moment and marker.exists():
                killed_s = marker.stat().st_mtime
            if killed_s:
                deadline_s = now_s + END_LIMIT_S
        if not killed_s and kill.moment and marker.exists():
            killed_s = marker.stat().st_mtime
        return killed_s, True


def _flags(end: int, save: Path, *, resumes: bool) -> list[str]:
    flags = [*MODEL, "--train-iters", str(end), "--save", str(save), "--results-dir", str(save.parent / "results"), "--run-name", save.name]
    return [*flags, "--load", str(save)] if resumes else flags


def _output(logs: Path, rank: int, stream: str) -> str:
    return "".join(path.read_text(errors="replace") for path in logs.glob(f"*/attempt_0/{rank}/{stream}.log"))


def _kill_rank(launcher: int, rank: int) -> bool:
    """SIGKILL for a rank's process; False if there is none."""
    for child in psutil.Process(launcher).children():
        if child.environ().get("RANK") == str(rank):
            child.send_signal(signal.SIGKILL)
            return True
    return False


def _processes(token: str) -> list[psutil.Process]:
    """All processes of a job, wherever they went in the process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has ended, or is another user's
            continue
    return found


def _leftovers(token: str, temporary: Path, patience_s: float = 5.0) -> list[str]:
    """What is left of a job that has ended: processes, and planners' directories. Planners may need a moment on a busy machine."""
    deadline_s = time.monotonic() + patience_s
    while True:
        faults = [f"process left: {' '.join(process.cmdline())[:120]}" for process in _processes(token)]
        faults += [f"directory left: {path}" for path in temporary.glob("scalemoe-plan-*")]
        if not faults or time.monotonic() > deadline_s:
            return faults
        time.sleep(0.2)


def run_campaign(directory: Path, kills: list[checks.Kill], seed: int) -> dict:
    """All kills and the undisturbed end; the result for `--json`."""
    campaign, rows, waiting = Campaign(directory), [], list(kills)
    while waiting:
        kill = checks.take_kill(waiting, latest_iteration(campaign.save) is not None)
        outcome, faults = campaign.train_until_killed(f"kill-{len(rows) + 1}", kill)
        row = {"kill": len(rows) + 1, **dataclasses.asdict(kill), "ended_s": outcome.ended_s, "faults": faults}
        row |= {
            "iterations": len(outcome.log.losses),
            "moved_homes": outcome.log.moved_homes,
            "checkpoint": latest_iteration(campaign.save),
        }
        row["max_loss_difference"] = max((abs(x - campaign.reference[i]) for i, x in outcome.log.losses.items()), default=0.0)
        rows.append(row)
        text = f"rank {kill.rank}, {kill.moment} ({kill.occurrence}): ended {outcome.ended_s:.1f} s later, checkpoint {row['checkpoint']}"
        print(f"kill {row['kill']}/{len(kills)}  {text}  {'; '.join(faults) or 'ok'}", file=sys.stderr, flush=True)
    outcome, faults = campaign.train_until_killed("end", checks.Kill(-1, "", 0, 0.0))
    if outcome.log.moved_homes == 0:
        faults.append("no home has moved: the campaign tests nothing")
    faults += [f"left in the checkpoint directory: {path.name}" for path in campaign.save.glob(".*")]
    print(f"undisturbed end: iteration {max(outcome.log.losses, default=None)}  {'; '.join(faults) or 'ok'}", file=sys.stderr, flush=True)
    end = {"iteration": max(outcome.log.losses, default=None), "moved_homes": outcome.log.moved_homes, "faults": faults}
    return {"seed": seed, "kills": rows, "end": end}


def table(result: dict) -> str:
    by_moment = collections.defaultdict(list)
    for row in result["kills"]:
        by_moment[row["moment"]].append(row)
    lines = []
    for moment, rows in sorted(by_moment.items()):
        ended_s = [row["ended_s"] for row in rows]
        failed = sum(bool(row["faults"]) for row in rows)
        lines.append([moment, len(rows), f"{statistics.median(ended_s):.1f}", f"{max(ended_s):.1f}", failed])
    total, moved = len(result["kills"]), sum(row["moved_homes"] for row in [*result["kills"], result["end"]])
    failed = sum(bool(row["faults"]) for row in result["kills"])
    worst = max((row["max_loss_difference"] for row in result["kills"]), default=0.0)
    head = format_table(["moment", "kills", "median s to the end", "longest", "failed"], lines)
    end = f"undisturbed to iteration {result['end']['iteration']}: {'; '.join(result['end']['faults']) or 'ok'}"
    return f"{head}\n\n{total} kills, {failed} failed; {moved} homes moved; largest loss difference {worst:.1e}; {end}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keep checkpoints and logs in this new directory (default: a temporary one)")
    add_output_flags(parser)
    args = parser.parse_args()
    try:
        check_output(args.output, force=args.force)
        kills = checks.choose_kills(args.kills, RANKS, args.seed)
        with contextlib.ExitStack() as stack:
            directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scalemoe-kills-")))
            if args.directory is not None:
                directory.mkdir(parents=True)
            result = run_campaign(directory.resolve(), kills, args.seed)
        emit(args, result, table(result))
    except ScaleMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = any(row["faults"] for row in [*result["kills"], result["end"]])
    return CHECK_FAILED if failed else OK


if __name__ == "__main__":
    sys.exit(main())
