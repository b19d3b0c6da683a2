"""`python -m megatron_scalemoe`: the same as `scalemoe`."""

import sys

from megatron_scalemoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
