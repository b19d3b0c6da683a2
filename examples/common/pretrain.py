"""What `pretrain_gpt.py` and `pretrain_bert.py` do: read the flags, choose the device, train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from arguments import parse_args

from megatron_scalemoe.environment import refusal
from megatron_scalemoe.errors import ScaleMoEError, as_raised
from megatron_scalemoe.faults.orphans import end_with_launcher
from megatron_scalemoe.faults.told import tell_once
from megatron_scalemoe.mcore import cpu_ranks

if TYPE_CHECKING:
    from task import Task


def pretrain(load_task: Callable[[], Task]) -> int:
    """Train by the command line's flags; returns the exit status. load_task imports megatron.core, so it is called late."""
    end_with_launcher()
    try:
        args = parse_args()
        choose_device(args.device)
        from training import train  # after choose_device: it imports megatron.core

        train(args, load_task())
    except ScaleMoEError as error:
        return tell_once(as_raised(error))
    except (OSError, MemoryError, ImportError) as error:
        return tell_once(refusal(error))
    return 0


def choose_device(device: str) -> None:
    """Bind this rank to its GPU, or make Megatron-Core run on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ScaleMoEError("--device cuda needs a GPU", found="torch.cuda.is_available() is False", try_="--device cpu")
    if device == "cpu" and torch.cuda.is_available():
        raise ScaleMoEError("--device cpu is for machines without CUDA", found="a GPU", try_="CUDA_VISIBLE_DEVICES= to hide it")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        cpu_ranks.install()
