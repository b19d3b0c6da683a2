"""`scalemoe launch`: a job's YAML file as an sbatch script, submitted or shown."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_scalemoe.cli.common import OK, check_output
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import write_atomically

# Named here so that --help needs no import; a test compares them with the scripts' own list.
SCRIPTS = ("pretrain", "bench", "topology")
_SBATCH_TIMEOUT_S = 120


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `launch` to the command line."""
    text = "submit a job's YAML file to SLURM"
    description = f"{text}: the script of examples/slurm with its configuration written from the file."
    parser = commands.add_parser("launch", help=text, description=description, allow_abbrev=False)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="the job's file, as in examples/configs")
    job.add_argument("--config", dest="config_flag", metavar="FILE", type=Path, help="the same as CONFIG")
    parser.add_argument("--script", choices=SCRIPTS, default=SCRIPTS[0], help="what to run (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="also write the script to FILE")
    parser.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints the script, or hands it to sbatch and prints the job's number."""
    from megatron_scalemoe.job.checks import check_cluster, check_job
    from megatron_scalemoe.job.flags import why_unchecked
    from megatron_scalemoe.job.job_file import load_job
    from megatron_scalemoe.job.sbatch import render_sbatch

    check_output(args.output, force=args.force)
    job = load_job(args.config or args.config_flag)
    numbers = check_job(job)
    check_cluster(job)
    if why := why_unchecked(job):
        print(f"scalemoe: note: Megatron's flags are not checked: {why}", file=sys.stderr)
    text = render_sbatch(job, args.script)
    if args.output is not None:
        write_atomically(args.output, text, force=args.force)
    if args.dry_run:
        print(text, end="")
        return OK
    number = submit(text)
    print(f"submitted job {number}: {job.content.cluster.job_name}, {numbers['ranks']} ranks")
    return OK


def submit(text: str) -> str:
    """The number that SLURM gives the script. Raises `ScaleMoEError` with sbatch's own words when it refuses."""
    if shutil.which("sbatch") is None:
        raise ScaleMoEError("sbatch is not installed here", try_="a login node of the cluster, or --dry-run")
    try:
        result = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=_SBATCH_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ScaleMoEError(f"sbatch did not answer within {_SBATCH_TIMEOUT_S} s", try_="sinfo, to see whether SLURM does") from error
    print(result.stderr, end="", file=sys.stderr)
    if result.returncode != 0:
        raise ScaleMoEError("sbatch refused the script", found=result.stderr.strip(), try_="--dry-run, to read it")
    return result.stdout.strip().split(";")[0]
