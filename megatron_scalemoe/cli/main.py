"""`scalemoe`: reads the command line and calls the sub-command's handler.

Exit codes: 0 ok, 1 user error, 2 usage, 3 a check failed. Sub-commands import what is heavy inside their handlers, so `--help` is quick.
"""

import os
import sys

from megatron_scalemoe.errors import ScaleMoEError

USER_ERROR = 1
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be text, and a terminal need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        from megatron_scalemoe.cli.parser import build_parser  # here: with little memory even an import may fail

        args = build_parser().parse_args(argv)
        code = args.handler(args)
        sys.stdout.flush()
        return code
    except ScaleMoEError as error:
        return _tell(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`| head`); Python must not try to flush the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (OSError, MemoryError, ImportError) as error:
        from megatron_scalemoe.environment import refusal

        return _tell(refusal(error))


def _tell(error: ScaleMoEError) -> int:
    print(f"scalemoe: error: {error}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
