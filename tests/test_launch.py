"""`python -m megatron_scalemoe.launch`, with scripts that are not Megatron's; Megatron's own are in tests/megatron_lm."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
print(__name__, sys.argv[0] == __file__, sys.argv[1:], sys.path[0] == {folder!r}, "megatron" in sys.modules)
"""
# As on a machine with a GPU, where the launcher stands in for nothing.
WITH_GPU = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
from megatron_scalemoe.launch import main
sys.exit(main())
"""
AS_IT_IS = "import sys; from megatron_scalemoe.launch import main; sys.exit(main())"


def launch(program: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parent.parent
    environment = {"PYTHONPATH": str(root), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "scripts" / "pretrain.py"
    path.parent.mkdir()
    path.write_text(SCRIPT.format(folder=str(path.parent)))
    return path


def test_without_our_flag_the_script_runs_as_it_would_without_us(script, tmp_path):
    done = launch(WITH_GPU, script, "--lr", "0.1", "--moe-dispatcher", "stock", "--data-path", "a", "b", cwd=tmp_path)
    assert done.stdout == "__main__ True ['--lr', '0.1', '--data-path', 'a', 'b'] True False\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scalemoe-replicas", "2"], "--scalemoe-replicas needs --moe-dispatcher scalemoe"),
        (["--moe-dispatcher", "scalemoe", "--scalemoe-replicas", "-1"], "--scalemoe-replicas: must be 0 or more"),
        (["--moe-dispatcher", "scalemoe"], "no Megatron-LM beside"),
    ],
)
def test_wrong_flags_are_refused_before_the_script_starts(script, flags, message, tmp_path):
    done = launch(WITH_GPU, script, *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("[rank 0] error: ")
    assert message in done.stderr
    assert not done.stdout


def test_cpu_ranks_need_a_script_of_megatron(script, tmp_path):
    assert "no Megatron-LM beside" in launch(AS_IT_IS, script, cwd=tmp_path).stderr


def test_usage(tmp_path):
    for flags, code in (([], 2), (["--help"], 0), (["--lr", "1"], 2)):
        done = launch(AS_IT_IS, *flags, cwd=tmp_path)
        assert done.returncode == code
        assert "-m megatron_scalemoe.launch /path/to/Megatron-LM/pretrain_gpt.py" in done.stdout + done.stderr
    missing = launch(AS_IT_IS, "nowhere.py", cwd=tmp_path)
    assert missing.returncode == 1
    assert "found: nowhere.py" in missing.stderr
