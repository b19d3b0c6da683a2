"""`scalemoe`: reads the command line and calls the sub-command's handler.

Exit codes: 0 ok, 1 user error, 2 usage, 3 a check failed. Sub-commands import what is heavy inside their handlers, so `--help` is quick.
"""

import argparse
import sys

from megatron_scalemoe.cli import bench, doctor
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.version import __version__

USER_ERROR = 1
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each sub-command sets `handler(args) -> exit code`."""
    parser = argparse.ArgumentParser(prog="scalemoe", description="Tools around ScaleMoE for Megatron-Core.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"scalemoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor.add_parser(commands)
    bench.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.handler(args)
    except ScaleMoEError as error:
        print(f"scalemoe: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
