"""The shortest script of one's own: the same losses with and without us."""

import os
import re
import subprocess
import sys
from pathlib import Path

MINIMAL = Path(__file__).resolve().parents[2] / "examples" / "minimal.py"


def test_the_losses_are_stocks(tmp_path):
    def losses(*flags: str) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(MINIMAL), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(MINIMAL.parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return re.findall(r"step \d: loss ([\d.]+)", done.stdout)

    stock = losses()
    assert len(stock) == 3 and losses("--moe-dispatcher", "scalemoe") == stock
