"""`scalemoe`: reads the command line and calls the sub-command's handler.

Exit codes: 0 ok, 1 user error, 2 usage, 3 a check failed. Sub-commands import what is heavy inside their handlers, so `--help` is quick.
"""

import argparse
import os
import sys

from megatron_scalemoe.cli import doctor, flags, launch, report, trace
from megatron_scalemoe.cli.bench import command as bench
from megatron_scalemoe.cli.planning import compare, diff, plan, simulate
from megatron_scalemoe.cli.topology import command as topology
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.version import __version__

USER_ERROR = 1
INTERRUPTED = 130
PIPE_CLOSED = 141


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each sub-command sets `handler(args) -> exit code`."""
    parser = argparse.ArgumentParser(prog="scalemoe", description="Tools around ScaleMoE for Megatron-Core.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"scalemoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor.add_parser(commands)
    bench.add_parser(commands)
    topology.add_parser(commands)
    trace.add_parser(commands)
    plan.add_parser(commands)
    diff.add_parser(commands)
    simulate.add_parser(commands)
    compare.add_parser(commands)
    report.add_parser(commands)
    flags.add_parser(commands)
    launch.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code = args.handler(args)
        sys.stdout.flush()
        return code
    except ScaleMoEError as error:
        print(f"scalemoe: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`| head`); Python must not try to flush the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
