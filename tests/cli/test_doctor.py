"""`scalemoe doctor`: the judgement on made-up machines, and the command on this one."""

import copy
import json

import pytest

from megatron_scalemoe.cli import doctor
from megatron_scalemoe.cli.main import main

CPU_MACHINE = {
    "versions": {
        "megatron_scalemoe": "0.1",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "megatron_core": "0.16.1",
        "numpy": "2.0",
        "psutil": "7.0",
        "tensorboard": "2.20",
        "transformer_engine": None,
        "grouped_gemm": None,
        "apex": None,
    },
    "torch": {"error": None, "cuda_build": None, "cuda": False, "cuda_devices": [], "gloo": True, "nccl": False, "grouped_mm": True},
    "shm": {"total_bytes": 8 << 30, "free_bytes": 8 << 30},
    "why_not_native": {"cpu": None, "cuda": None},
}


def machine(**changes) -> dict:
    """CPU_MACHINE with some of its versions, torch or shm facts changed."""
    facts = copy.deepcopy(CPU_MACHINE)
    for name, value in changes.items():
        section = next(s for s in facts.values() if name in s)
        section[name] = value
    return facts


def failing(facts: dict) -> dict[str, str]:
    return {c["name"]: c["advice"] for c in doctor.needed_checks(facts) if not c["ok"]}


def not_working(facts: dict) -> dict[str, str]:
    return {f["name"]: f["why_not"] for f in doctor.features(facts) if not f["works"]}


def test_a_complete_cpu_machine_can_train():
    assert failing(CPU_MACHINE) == {}
    assert list(not_working(CPU_MACHINE)) == [
        "training on GPUs (NCCL)",
        "native CUDA ops, --scalemoe-transport cuda",
        "--moe-grouped-gemm (Megatron's own grouped experts)",
        "Megatron's fused Adam and norms",
    ]


def test_missing_native_libraries_are_named_with_their_reason():
    facts = {**CPU_MACHINE, "why_not_native": {"cpu": "there was no C++ compiler", "cuda": "there was no nvcc"}}
    assert failing(facts) == {}
    assert not_working(facts)["native CPU ops, --scalemoe-transport shm"] == "there was no C++ compiler"
    assert not_working(facts)["native CUDA ops, --scalemoe-transport cuda"] == "there was no nvcc"


def test_a_complete_gpu_machine_can_do_everything():
    facts = machine(cuda_build="13.0", cuda=True, nccl=True, cuda_devices=["H200"], transformer_engine="2.9")
    assert failing(facts) == {}
    assert not_working(facts) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "CPU build"),
        ({"cuda_build": "13.0", "nccl": True}, "sees no device"),
        ({"cuda_build": "13.0", "cuda": True}, "built without nccl"),
        ({"error": "No module named 'torch'", "gloo": False}, "cannot be imported"),
    ],
)
def test_the_reason_for_not_using_gpus_is_exact(changes, reason):
    assert reason in not_working(machine(**changes))["training on GPUs (NCCL)"]


@pytest.mark.parametrize("version", [None, "0.17.0"])
def test_megatron_outside_the_range_is_named(version):
    assert "supported: 0.16.1 and 0.19.0" in failing(machine(megatron_core=version))["megatron-core"]


def test_missing_psutil_is_said_to_hang_the_checkpoint():
    facts = machine(psutil=None)
    assert "hangs" in failing(facts)["psutil"]
    assert "checkpoint save" in not_working(facts)


def test_a_broken_torch_shows_its_error():
    facts = machine(error="libcudart.so.13: cannot open shared object file", gloo=False, grouped_mm=False)
    assert failing(facts)["torch"].startswith("libcudart")
    assert "communication" in failing(facts)


def test_small_shared_memory_is_no_obstacle_but_is_said():
    facts = machine(total_bytes=64 << 20)
    assert failing(facts) == {}
    assert "64.0 MiB here" in not_working(facts)["/dev/shm of 1.0 GiB or more"]


@pytest.mark.parametrize(("facts", "code"), [(CPU_MACHINE, 0), (machine(megatron_core=None), 3)])
def test_exit_code_and_table(facts, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: facts)
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert ("Not ready to train" in out) == (code == 3)
    assert ("MISSING: supported" in out) == (code == 3)


def test_the_package_called_apex_on_the_index_is_not_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not doctor._is_nvidia_apex()
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert doctor._is_nvidia_apex()


def test_this_machine(capsys):
    """The tests need the train extra, so the doctor must find this machine ready."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert set(report) == {"versions", "torch", "shm", "why_not_native", "checks", "features", "ok"}
    assert report["versions"]["torch"]
