"""What every worker of `scalemoe bench` and `scalemoe topology measure` does around its measurement: torchrun starts it on each rank."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scalemoe.faults.orphans import end_with_launcher


def run_worker(measure: Callable[[], dict], result_file: Path, timeout_s: float) -> None:
    """Joins the ranks (NCCL where there are GPUs, gloo otherwise), measures, and writes the result of rank 0 as JSON."""
    end_with_launcher()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        result = measure()
        if dist.get_rank() == 0:
            result_file.write_text(json.dumps(result))
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
