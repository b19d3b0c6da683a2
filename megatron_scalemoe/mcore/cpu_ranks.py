"""Megatron-Core on CPU ranks: stand-ins for the part of `torch.cuda` that Megatron-Core calls, for gloo without a GPU.

`install()` is the only way in and is called by choice (`--device cpu`, tests); importing this module changes nothing. It must run before
`megatron.core` is imported, because Megatron binds some `torch.cuda` names at import; it then imports `megatron.core` itself and repairs
what cannot work on a CPU. `torch.cuda.is_available()` stays False: code that asks gets the truth.

Work on a CPU is done when the call returns, so streams and events have nothing to order and are empty. The "device" RNG is torch's default
CPU generator, which is what dropout and weight initialisation draw from; Megatron forks it by saving and restoring its state. A data loader
must therefore have a generator of its own, or a resumed run reads other random numbers than the run it continues.

Not covered, because no CPU equivalent exists: fused kernels (set `bias_dropout_fusion`, `masked_softmax_fusion` and
`gradient_accumulation_fusion` to False), CUDA graphs, Transformer Engine, `async_save`.
"""

from __future__ import annotations

import functools
import logging
import queue
import sys
import warnings
from typing import Any

import torch

from megatron_scalemoe.errors import ScaleMoEError

_CPU = torch.device("cpu")


class CpuEvent:
    """What `CpuStream.record_event` returns: already complete."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CpuStream:
    """Stands in for `torch.cuda.Stream`: the work of a CPU stream is complete when the call returns."""

    def __init__(self, device: Any = None, priority: int = 0):
        pass

    def wait_stream(self, stream: CpuStream) -> None:
        """Nothing to wait for."""

    def record_event(self) -> CpuEvent:
        """An event that is complete already."""
        return CpuEvent()


def install() -> None:
    """Make Megatron-Core train on CPU ranks in this process; a second call does nothing.

    Raises `ScaleMoEError` where CUDA is available (nothing to stand in for) and when `megatron.core` was imported before.
    """
    if torch.cuda.Stream is CpuStream:
        return
    if torch.cuda.is_available():
        raise ScaleMoEError("CPU ranks are for machines without CUDA", found="torch.cuda.is_available()", try_="--device cuda")
    if "megatron.core" in sys.modules:
        raise ScaleMoEError(
            "cpu_ranks.install() must run before megatron.core is imported",
            found="megatron.core in sys.modules",
            try_="call megatron_scalemoe.mcore.cpu_ranks.install() first thing in main(), and import megatron.core after it",
        )
    # Missing GPU libraries are no loss here, and Megatron's use of old torch names is not the user's affair.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|is deprecated|use DTensor).*")
    _replace_streams()
    _replace_rng()
    _replace_device_names()
    _import_megatron_without_inductor()
    _repair_megatron()


def _replace_streams() -> None:
    only_stream = CpuStream()
    # `device=torch.cuda.current_device()` is how Megatron makes most of its tensors, and how it moves router weights and rotary tables.
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.Stream = CpuStream  # copy stream of the all-to-all dispatcher, shared experts
    torch.cuda.current_stream = lambda device=None: only_stream  # dispatcher, shared experts
    torch.cuda.synchronize = lambda device=None: None  # timers, pipeline communication, checkpoint writer


def _replace_rng() -> None:
    """Megatron's RNG tracker and checkpoints read and write the device generator's state; here that is the default CPU generator."""
    generator = torch.default_generator
    torch.cuda.manual_seed = lambda seed: generator.manual_seed(int(seed))  # model_parallel_cuda_manual_seed
    torch.cuda.get_rng_state = lambda device="cuda": generator.get_state()  # tracker.add, checkpoints
    torch.cuda.random.get_rng_state = lambda device="cuda": generator.get_state()  # tracker.fork
    torch.cuda.set_rng_state = lambda state, device="cuda": generator.set_state(state)  # checkpoints
    torch.cuda.default_generators = {_CPU: generator}  # tracker.fork, indexed by current_device()
    torch.cuda._lazy_call = lambda callback, **_: callback()  # tracker.fork: torch would queue it until CUDA starts, so for ever
    # The tracker warns when the CPU generator moves inside a fork, an error on a GPU and the whole point here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _replace_device_names() -> None:
    # device="cuda" literals: loss scale and gradient norm (tensor), schedules and MoE metrics (zeros), causal masks (ones).
    for name in ("tensor", "zeros", "ones"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # tied embeddings over a pipeline, batch broadcast, optimizer gather
    # Optimizers compare param.type() with 'torch.cuda.FloatTensor' and refuse every other name.
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **kw: type_of(self, *args, **kw) if args or kw else _cuda_type_name(type_of(self))


def _on_cpu(factory: Any) -> Any:
    """`factory` with device="cuda" read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _cuda_type_name(name: str) -> str:
    """'torch.FloatTensor' -> 'torch.cuda.FloatTensor'."""
    return name.replace("torch.", "torch.cuda.", 1)


def _import_megatron_without_inductor() -> None:
    """`megatron.core.jit.jit_fuser` is `torch.compile`, bound at import; inductor needs a C++ compiler and a warm-up, so leave functions as
    they are. `torch.compile` itself is back in place afterwards."""
    compile_ = torch.compile
    torch.compile = lambda function: function
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_


def _repair_megatron() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Router without Transformer Engine: the name is read and compared with None, but bound only where TE is installed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The all-to-all dispatcher turns split sizes into numpy only when it copies them from a GPU; all_to_all_single needs integers.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_numpy
    # On a CPU torch.norm adds up in float32, one by one: 1e-5 off for a million elements, and by more the larger the tensor. Clipping would
    # then depend on how weights are cut into tensors (stacked experts or single ones), as it does not on a GPU.
    clip_grads.l2_norm_impl = _l2_norm
    # The checkpoint writer forks, which can deadlock below gloo's threads and is forbidden in daemonic workers, and it reports through the
    # queue of a spawned process, which imports the user's script again. A CPU has no copy to overlap with: write here and now.
    if hasattr(filesystem_async, "get_write_results_queue"):  # 0.19 writes in threads
        filesystem_async.get_write_results_queue = functools.cache(lambda mp_mode="spawn": queue.Queue())
    else:
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_process)
        filesystem_async._get_write_results_queue = functools.cache(queue.Queue)


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *args: Any) -> tuple:
    """As Megatron's `local_multi_tensor_l2_norm`, added up in float64."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensors in tensor_lists for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def _write_in_process(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Writes each bucket as the forked writers would, and puts `{bucket index: written items}`, or the error, into `results`."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: Any = {}
    for index, bucket in enumerate(buckets):
        report: queue.Queue = queue.Queue()
        running: queue.Queue = queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, report, running, use_fsync=True, use_msc=use_msc)
        _, outcome = report.get()
        if isinstance(outcome, Exception):
            written = outcome
            break
        written[index] = outcome
    results.put(written)
