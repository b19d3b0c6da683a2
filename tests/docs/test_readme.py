"""The README's two pieces of Python, as they stand there."""

import os
import subprocess
import sys

import pytest

from tests.docs.docs_pages import FENCE, ROOT


def piece(name: str) -> str:
    [code] = [block for language, block in FENCE.findall((ROOT / "README.md").read_text()) if language == "python" and name in block]
    return code


def run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_from_counts():
    assert run(["-c", piece("plan_placement")]) == "(4, 96)\n[80 73 75 80]\n"


def test_dispatch_in_plain_torch(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "dispatch.py"
    check = "assert torch.allclose(y, 2 * x * top_probs.sum(1, keepdim=True), atol=1e-5) and x.grad is not None\nprint('same')\n"
    script.write_text(piece("RaggedDispatcher") + check)
    assert run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]).count("same") == 2
