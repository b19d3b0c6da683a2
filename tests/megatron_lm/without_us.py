"""Runs a Megatron-LM script on CPU ranks as the launcher does, without the launcher: what the launcher must not change."""

import os
import runpy
import sys

from megatron_scalemoe.mcore.scripts import cpu as cpu_script

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    cpu_script.install()
    runpy.run_path(sys.argv[0], run_name="__main__")
