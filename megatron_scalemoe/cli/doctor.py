"""`scalemoe doctor`: what is installed, what will work here, what will not and why."""

import argparse
import importlib.util
import platform
import shutil
from pathlib import Path

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.environment import MEGATRON_CORE_RELEASES, installed_version, is_supported_megatron
from megatron_scalemoe.ops import native
from megatron_scalemoe.units import format_bytes
from megatron_scalemoe.version import __version__

INSTALL = "pip install 'megatron-scalemoe[train]'"
PLANNER_NEEDS = ("numpy", "scipy", "networkx", "yaml", "pydantic")
# Docker's default is 64 MiB; NCCL takes about 10 MiB for each pair of ranks, DataLoader workers more.
SHM_WANTED = 1 << 30


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `doctor` to the command line."""
    parser = commands.add_parser("doctor", help="what is installed and what will work here", allow_abbrev=False, description=__doc__)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report. Exit code 3 if something that training needs is missing."""
    check_output(args.output, force=args.force)
    facts = gather()
    report = {**facts, "checks": needed_checks(facts), "features": features(facts)}
    report["ok"] = all(check["ok"] for check in report["checks"])
    emit(args, report, format_report(report))
    return OK if report["ok"] else CHECK_FAILED


def gather() -> dict:
    """Facts about this machine, not yet judged."""
    versions = {
        "megatron_scalemoe": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name.replace("_", "-")) for name in ("torch", "megatron_core", "numpy", "psutil", "tensorboard")},
        "transformer_engine": installed_version("transformer-engine", "transformer-engine-torch"),
        "grouped_gemm": installed_version("grouped-gemm", "nv-grouped-gemm"),
        "apex": installed_version("apex") if _is_nvidia_apex() else None,
    }
    why_not_native = {kind: native.why_not(kind) for kind in ("cpu", "cuda")}
    return {"versions": versions, "torch": _torch_facts(), "shm": _shared_memory(), "why_not_native": why_not_native}


def _torch_facts() -> dict:
    facts = {"error": None, "cuda_build": None, "cuda": False, "cuda_devices": [], "gloo": False, "nccl": False, "grouped_mm": False}
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return facts | {"error": str(error)}
    cuda = torch.cuda.is_available()
    return facts | {
        "cuda_build": torch.version.cuda,
        "cuda": cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "grouped_mm": hasattr(torch.nn.functional, "grouped_mm"),
    }


def _is_nvidia_apex() -> bool:
    # The package named apex on the index is something else: NVIDIA's has multi_tensor_apply.
    spec = importlib.util.find_spec("apex")
    return spec is not None and any((Path(p) / "multi_tensor_apply").is_dir() for p in spec.submodule_search_locations or [])


def _shared_memory() -> dict:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return {"total_bytes": 0, "free_bytes": 0}
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def needed_checks(facts: dict) -> list[dict]:
    """What training cannot do without: `[{name, found, ok, advice}]`."""
    versions, torch = facts["versions"], facts["torch"]
    megatron = versions["megatron_core"]
    supported = " and ".join(MEGATRON_CORE_RELEASES) + ", with their patches"
    backends = [name for name in ("gloo", "nccl") if torch[name]]
    return [
        _check("torch", versions["torch"], torch["error"] is None, f"{torch['error']}; {INSTALL}"),
        _check("megatron-core", megatron, megatron is not None and is_supported_megatron(megatron), f"supported: {supported}; {INSTALL}"),
        _check("psutil", versions["psutil"], versions["psutil"] is not None, f"Megatron's checkpoint save hangs without it; {INSTALL}"),
        _check("communication", ", ".join(backends) or None, bool(backends), _no_backend(torch, "gloo")),
    ]


def _check(name: str, found: str | None, ok: bool, advice: str) -> dict:
    return {"name": name, "found": found, "ok": ok, "advice": None if ok else advice}


def _no_backend(torch: dict, backend: str) -> str:
    """Why ranks cannot talk through this backend."""
    if torch["error"] is not None:
        return "torch cannot be imported"
    if backend == "nccl" and torch["cuda_build"] is None:
        return "this torch is a CPU build"
    if backend == "nccl" and not torch["cuda"]:
        return f"torch (CUDA {torch['cuda_build']}) sees no device: compare nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"this torch was built without {backend}"


def features(facts: dict) -> list[dict]:
    """What will work here: `[{name, works, why_not}]`."""
    versions, torch = facts["versions"], facts["torch"]
    te_or_apex = versions["transformer_engine"] or versions["apex"]
    grouped = versions["transformer_engine"] or versions["grouped_gemm"]
    shm = facts["shm"]["total_bytes"]
    gpu = torch["cuda"] and torch["nccl"]
    why_not_cpu, why_not_cuda = facts["why_not_native"]["cpu"], facts["why_not_native"]["cuda"]
    lacking = [name for name in PLANNER_NEEDS if importlib.util.find_spec(name) is None]
    return [
        _feature("planner: topology, trace, plan, simulate, compare, diff", not lacking, f"not installed: {', '.join(lacking)}"),
        _feature("training on GPUs (NCCL)", gpu, _no_backend(torch, "nccl")),
        _feature("training on CPU ranks (gloo)", torch["gloo"], _no_backend(torch, "gloo")),
        _feature("--scalemoe-dispatch ragged, padded", torch["gloo"] or gpu, _no_backend(torch, "gloo")),
        _feature("native CPU ops, --scalemoe-transport shm", not why_not_cpu, why_not_cpu),
        _feature("native CUDA ops, --scalemoe-transport cuda", bool(gpu and not why_not_cuda), why_not_cuda or _no_backend(torch, "nccl")),
        _feature("--scalemoe-experts grouped", torch["grouped_mm"], "needs a torch with torch.nn.functional.grouped_mm"),
        _feature(
            "--moe-grouped-gemm (Megatron's own grouped experts)",
            bool(torch["cuda"] and grouped),
            "needs CUDA and Transformer Engine or grouped_gemm; --scalemoe-experts grouped needs neither",
        ),
        _feature("Megatron's fused Adam and norms", bool(torch["cuda"] and te_or_apex), "needs CUDA and Transformer Engine or NVIDIA Apex"),
        _feature("checkpoint save", versions["psutil"] is not None, "Megatron's writer hangs without psutil"),
        _feature("TensorBoard scalars", versions["tensorboard"] is not None, INSTALL),
        _feature(
            f"/dev/shm of {format_bytes(SHM_WANTED)} or more",
            shm >= SHM_WANTED,
            f"{format_bytes(shm)} here: NCCL and data-loader workers may fail; in Docker: --shm-size=1g or --ipc=host",
        ),
    ]


def _feature(name: str, works: bool, why_not: str) -> dict:
    return {"name": name, "works": works, "why_not": None if works else why_not}


def _planner(report: dict) -> str:
    return " The planner works here: it needs neither torch nor megatron-core." if report["features"][0]["works"] else ""


def format_report(report: dict) -> str:
    """The three tables that people read."""
    versions = [[name, version or "not installed"] for name, version in report["versions"].items()]
    versions.append(["CUDA devices", ", ".join(report["torch"]["cuda_devices"]) or "none"])
    versions.append(["/dev/shm", f"{format_bytes(report['shm']['total_bytes'])}, {format_bytes(report['shm']['free_bytes'])} free"])
    checks = [[c["name"], c["found"] or "-", "ok" if c["ok"] else f"MISSING: {c['advice']}"] for c in report["checks"]]
    works = [["yes" if f["works"] else "no", f["name"], f["why_not"] or ""] for f in report["features"]]
    return "\n\n".join(
        [
            format_table(["software", "version"], versions),
            format_table(["needed to train", "found", "status"], checks),
            format_table(["works", "feature", "why not"], works),
            "Ready to train." if report["ok"] else f"Not ready to train: see MISSING above.{_planner(report)}",
        ]
    )
