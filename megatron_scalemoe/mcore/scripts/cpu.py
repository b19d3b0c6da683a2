"""Megatron-LM's own training scripts on CPU ranks: stand-ins for what they need of a GPU beyond what Megatron-Core does.

The launcher calls `install()` where there is no CUDA, before `megatron` is imported. It does for `pretrain_gpt.py` what `cpu_ranks` does
for Megatron-Core alone: the script runs unmodified, over gloo (`--distributed-backend gloo`). `torch.cuda.is_available()` stays False.

The data loaders get a random generator of their own, because the "device" generator is torch's default one: otherwise a run that resumes
from a checkpoint would start its loaders, and so draw numbers, where the run that it continues did not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_scalemoe.mcore import cpu_ranks

_TRITON_KERNELS = (
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
)


def install() -> None:
    """Make the training scripts of Megatron-LM, which must be on `sys.path`, run on CPU ranks in this process.

    Raises `ScaleMoEError` as `cpu_ranks.install` does.
    """
    cpu_ranks.install()
    atexit.register(_leave_process_groups)
    _stand_in_for_device()
    _stand_in_for_triton()
    _use_built_dataset_helpers()
    _repair_layers()
    _repair_optimizer()
    _repair_training()


def _leave_process_groups() -> None:
    """Megatron leaves them to the end of the process, where gloo's threads may still run: then the process aborts after all is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _stand_in_for_device() -> None:
    torch.cuda.device_count = lambda: 1  # 0 would skip the process groups
    torch.cuda.set_device = lambda device: None
    torch.cuda.stream = _on_stream  # DDP is made on a stream of its own
    torch.utils.data.DataLoader.__init__ = _with_own_generator(torch.utils.data.DataLoader.__init__)


@contextlib.contextmanager
def _on_stream(stream: cpu_ranks.CpuStream) -> Iterator[cpu_ranks.CpuStream]:
    """Work on a CPU is done when the call returns, whatever the stream."""
    yield stream


def _with_own_generator(init: Any) -> Any:
    @functools.wraps(init)
    def make(loader: Any, dataset: Any, *args: Any, generator: torch.Generator | None = None, **options: Any) -> None:
        options["pin_memory"] = False
        init(loader, dataset, *args, generator=generator or torch.Generator(), **options)

    return make


def _stand_in_for_triton() -> None:
    """The scripts import these kernels whether they are used or not, and they import triton."""
    if importlib.util.find_spec("triton") is not None:
        return
    for name in _TRITON_KERNELS:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = _missing_kernel
    sys.modules[_TRITON_KERNELS[0]].is_batch_invariant_mode_enabled = lambda: False


def _missing_kernel(name: str) -> Any:
    """Of a module: a function that fails when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **options: Any) -> None:
        raise RuntimeError(f"{name} needs triton, and a GPU")

    return kernel


def _use_built_dataset_helpers() -> None:
    """A checkout would compile them with `make`, which needs pybind11; a wheel of Megatron-Core beside it has them built."""
    from megatron.core import datasets
    from megatron.core.datasets import utils

    folders = [Path(entry) / "megatron/core/datasets" for entry in sys.path]
    built = [folder for folder in folders if list(folder.glob("helpers_cpp.*.so"))]
    if built:
        datasets.__path__.append(str(built[0]))
        utils.compile_helpers = lambda: None


def _repair_layers() -> None:
    """What needs Transformer Engine in Megatron-LM's models, and has an equivalent here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import torch_norm

    try:
        from megatron.core.models.hybrid import hybrid_block
    except ImportError:  # its name before 0.19
        from megatron.core.ssm import mamba_block as hybrid_block

    from megatron_scalemoe.mcore.layers.norm import SequenceParallelNorm

    torch_norm.WrappedTorchNorm.__new__ = _norm_for_sequence_parallelism(torch_norm.WrappedTorchNorm.__new__, SequenceParallelNorm)
    if not HAVE_TE:
        hybrid_block.TENorm = torch_norm.WrappedTorchNorm  # the final norm of hybrid models


def _norm_for_sequence_parallelism(plain: Any, sequence_parallel: type) -> Any:
    def make(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> torch.nn.Module:
        if config.sequence_parallel:
            return sequence_parallel(config, hidden_size, eps)
        return plain(cls, config, hidden_size, eps, **options)

    return make


def _repair_optimizer() -> None:
    """The distributed optimizer can save the state of torch's Adam, but not load it."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    from megatron_scalemoe.mcore.checkpoint.optimizer import load_distributed, prepare_optimizer_state

    if HAVE_APEX_OR_TE:
        return
    sharded_state_dict, load_state_dict = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict

    def prepared_sharded_state_dict(optimizer: Any, *args: Any, **options: Any) -> Any:
        prepare_optimizer_state(optimizer)
        return sharded_state_dict(optimizer, *args, **options)

    def load(optimizer: Any, state: dict) -> None:
        if "param_state" in state:
            load_distributed(optimizer, state, state.pop("param_state_sharding_type"))
        else:
            load_state_dict(optimizer, state)

    DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict = prepared_sharded_state_dict, load


def _repair_training() -> None:
    from megatron.training import arguments, training

    arguments.get_device_arch_version = lambda: 10  # older ones must have CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor parallelism
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda **options: None  # nothing is compiled, so nothing has to warm up
    if importlib.util.find_spec("megatron.legacy") is not None:  # gone in 0.19
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None  # wants nvcc
