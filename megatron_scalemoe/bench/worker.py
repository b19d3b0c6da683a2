"""What every worker of `scalemoe bench` and `scalemoe topology measure` does around its measurement: torchrun starts it on each rank."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scalemoe.environment import refusal
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.orphans import end_with_launcher
from megatron_scalemoe.faults.told import tell_once
from megatron_scalemoe.units import to_json


def run_worker(measure: Callable[[], dict], result_file: Path, timeout_s: float) -> None:
    """Joins the ranks (NCCL where there are GPUs, gloo otherwise), measures, and writes the result of rank 0 as JSON."""
    end_with_launcher()
    try:
        _measure_together(measure, result_file, timeout_s)
    except ScaleMoEError as error:
        sys.exit(tell_once(error))
    except (OSError, MemoryError, ImportError) as error:
        sys.exit(tell_once(refusal(error)))


def _measure_together(measure: Callable[[], dict], result_file: Path, timeout_s: float) -> None:
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        result = measure()
        if dist.get_rank() == 0:
            result_file.write_text(to_json(result), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def use_megatron() -> None:
    """Before anything of Megatron is imported: without GPUs it needs the stand-ins of `cpu_ranks`."""
    if not torch.cuda.is_available():
        from megatron_scalemoe.mcore import cpu_ranks

        cpu_ranks.install()


def synchronize() -> None:
    """Until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_device() -> dict[str, object]:
    """What these figures depend on beside the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "threads_per_rank": torch.get_num_threads()}
