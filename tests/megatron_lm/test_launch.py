"""The launcher: nothing without our flag; our flags in the help; what does not fit is refused before the first step, with the way out."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.topology.builders import fully_connected
from megatron_scalemoe.topology.topology_file import save_topology
from tests.megatron_lm.script import CHECKOUT, OURS, SECONDS, TOLERANCE, needs_checkout, run, stock

pytestmark = needs_checkout

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--train-iters", 4, "--expert-model-parallel-size", 2)
WITHOUT_US = (str(Path(__file__).parent / "without_us.py"),)


def test_without_our_flag_the_log_is_identical():
    """All of it but times: arguments, parameters, losses to the last digit. And it is not if we do take part."""
    alone = run(2, *FEW, program=WITHOUT_US)
    assert alone.ranks[1].count("lm loss: ") == 4
    assert stock(2, *FEW).steady == alone.steady
    assert run(2, *FEW, "--moe-dispatcher", "stock").steady == alone.steady
    assert run(2, *FEW, *OURS).steady != alone.steady


def test_the_patched_script_has_our_flag_without_the_launcher(tmp_path):
    """pretrain_gpt.py in a copy of the checkout."""
    shutil.copytree(CHECKOUT, tmp_path, ignore=lambda folder, names: {".git", "tests", "examples"} & set(names), dirs_exist_ok=True)
    subprocess.run(["bash", ROOT / "tools/apply_patches.sh", tmp_path], check=True, timeout=60)
    patched = {"program": WITHOUT_US, "checkout": str(tmp_path)}
    ours = run(2, *FEW, *OURS, "--scalemoe-table-interval", 4, **patched)
    assert "scalemoe: MoE layers until iteration 4" in ours.log
    assert ours.losses == pytest.approx(stock(2, *FEW).losses, abs=TOLERANCE)
    assert run(2, *FEW, **patched).steady == stock(2, *FEW).steady


def test_every_patch_fits_its_tag():
    tag = subprocess.run(["git", "-C", CHECKOUT, "describe", "--tags", "--exact-match"], capture_output=True, text=True).stdout.strip()
    if not tag:
        pytest.skip("MEGATRON_LM_PATH is no clone of a tag")
    done = subprocess.run(["bash", ROOT / "tools/check_patches.sh", CHECKOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tag}: proved" in done.stdout


@pytest.mark.parametrize("iterations", [200, 10])
def test_the_commands_in_the_docs(iterations):
    """On CPU ranks: from a clean machine, and the flags one by one."""
    page = (ROOT / "docs/megatron-lm.md").read_text()
    commands = re.findall(r"^torchrun --standalone .*?(?=```)", page, re.DOTALL | re.MULTILINE)
    [command] = [text for text in commands if ("tiny_cpu" in text) == (iterations == 200)]
    done = subprocess.run(
        ["bash", "-c", command.replace("../Megatron-LM", CHECKOUT)], capture_output=True, text=True, timeout=SECONDS, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"iteration {iterations:8}/{iterations:8}" in done.stdout
    assert f"scalemoe: MoE layers until iteration {iterations}" in done.stdout


def test_a_rank_that_dies_is_named(tmp_path):
    program = tmp_path / "rank_1_dies_in_step_3.py"
    program.write_text(
        """
import os, sys, torch
from megatron_scalemoe import launch
step, steps = torch.optim.AdamW.step, []
def dying_step(*args, **options):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        os._exit(7)
    return step(*args, **options)
torch.optim.AdamW.step = dying_step
sys.exit(launch.main())
"""
    )
    log = run(2, *FEW, *OURS, program=(str(program),), fails=True).ranks[0]
    assert "[rank 0] error: rank 1 died or hangs" in log


def test_help_lists_our_flags():
    try:
        run(1, "--help", program=WITHOUT_US)
    except AssertionError as error:
        if "ValueError: unsupported format character" in str(error):
            pytest.skip("Megatron-LM's own --help fails at this tag: a % in a help text")
        raise
    log = run(1, "--help").log
    assert "--moe-dispatcher {scalemoe,stock}" in log
    assert "--scalemoe-replicas" in log
    assert "--num-layers" in log


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (
            ("--moe-token-dispatcher-type", "flex"),
            ["--moe-token-dispatcher-type flex: set it to alltoall"],
        ),
        (("--scalemoe-replicas", 3), ["--scalemoe-replicas 3 is not a multiple of --expert-model-parallel-size 2"]),
        (
            ("--scalemoe-plan", "PLAN OF 4 RANKS"),
            ["2 layers, 2 ranks and 8 experts of", "2 layers, 4 ranks", "scalemoe plan"],
        ),
        (
            ("--scalemoe-plan", "PLAN OF 2 NODES", "--scalemoe-topology", "ONE NODE"),
            ["rank 0 | rank 1 in the plan, ranks 0-1 in the topology"],
        ),
        (
            ("--scalemoe-replicas", 2, "--ckpt-format", "torch", "--save", "/nowhere", "--save-interval", 10),
            ["--ckpt-format torch", "use torch_dist"],
        ),
        (("--scalemoe-sequence-placement", "history", "--num-workers", 2), ["add --num-workers 0"]),
    ],
    ids=lambda value: str(value[0])[2:40],
)
def test_refusals(flags, messages, tmp_path):
    log = run(2, *FEW, *OURS, *(_made(flag, tmp_path) for flag in flags), fails=True).log
    assert re.search(r"^\[rank \d\] error: ", log, re.MULTILINE)  # one of them tells it
    assert all(message in log for message in messages), log[-3000:]
    assert "iteration        1/" not in log


def test_ranks_with_other_flags_are_named(tmp_path):
    program = tmp_path / "other_flag_on_rank_1.py"
    add_flag = "sys.argv += ['--lr', '1.0'] * (os.environ['RANK'] == '1')"
    program.write_text(f"import os, sys\nfrom megatron_scalemoe import launch\n{add_flag}\nsys.exit(launch.main())\n")
    log = run(2, *FEW, *OURS, program=(str(program),), fails=True).log
    assert "--lr: 0.003 on rank 0; 1.0 on rank 1" in log


def test_scalemoe_flags_without_our_dispatcher_are_an_error():
    log = run(1, "--scalemoe-replicas", 2, fails=True).log
    assert "--scalemoe-replicas needs --moe-dispatcher scalemoe" in log


def _made(flag: object, folder: Path) -> object:
    """The file that a name in capitals stands for; other flags as they are."""
    path = folder / (f"{flag}.yaml" if flag == "ONE NODE" else f"{flag}.json")
    if flag == "PLAN OF 4 RANKS":
        save_plan(PlacementPlan.contiguous(2, 4, 8), path, force=True)
    elif flag == "PLAN OF 2 NODES":
        save_plan(dataclasses.replace(PlacementPlan.contiguous(2, 2, 8), provenance={"node_of_rank": [0, 1]}), path, force=True)
    elif flag == "ONE NODE":
        save_topology(fully_connected(gpus=2, gpus_per_node=2), path, force=True)
    return path if path.exists() else flag
