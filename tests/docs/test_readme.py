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
    printed = run(["-c", piece("plan_placement")])
    assert printed.startswith("(4, 96)\n") and printed.endswith("\n[80 73 75 80]\n")


def test_dispatch_in_plain_torch(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "dispatch.py"
    check = """
everywhere = [None] * dist.get_world_size()
dist.all_gather_object(everywhere, experts)
layer = [expert for of_rank in everywhere for expert in of_rank]
expected = sum(p[:, None] * torch.stack([layer[e](row) for e, row in zip(c, x)]) for p, c in zip(top_probs.T, chosen.T))
print("same" if torch.allclose(y, expected, atol=1e-5) and x.grad is not None else "other")
"""
    script.write_text(piece("RaggedDispatcher") + check)
    assert run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]).count("same") == 2
