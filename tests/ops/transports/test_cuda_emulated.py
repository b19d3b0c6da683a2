"""The CUDA transport between real processes: the emulated kernels over memory that the ranks share, against plain indexing."""

import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import library as ops
from megatron_scalemoe.ops.transports.cuda import CudaTransport, SymmetricBuffers
from megatron_scalemoe.ops.transports.registry import register, unregister
from tests.ops.transports.emulated import CPU, build_library, load_library
from tests.ops.transports.exchange_cases import Case, differing, expected_outputs, make_inputs, run_operations
from tests.ops.transports.reference import ReferenceTransport
from tests.rank_pool import pool

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")

CASES = {
    "fp32": Case(ranks=2, top_k=3, num_local=3, tokens=(30, 12)),
    "bf16, aligned": Case(ranks=4, top_k=4, tokens=(10, 0, 17, 9), dtype=torch.bfloat16, alignment=8),
    "fp16, dropped": Case(ranks=4, tokens=(20, 9), dtype=torch.float16, wanted=0.4),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_library(tmp_path_factory.mktemp("emulated"))


def open_emulated(built: Path, folder: Path, case: Case, timeout_s: float) -> CudaTransport:
    """Collective: this process's end, over files in `folder` that all map."""
    library, group = load_library(built), dist.group.WORLD
    nbytes = case.limits.buffer_bytes(library, case.ranks)
    mapped = [torch.from_file(str(folder / str(rank)), shared=True, size=nbytes, dtype=torch.uint8) for rank in range(case.ranks)]
    buffers = SymmetricBuffers(group.rank(), [tensor.data_ptr() for tensor in mapped], mapped.clear)
    transport = CudaTransport(library, buffers, case.limits, timeout_s, CPU, group)
    dist.barrier()
    return transport


def compare(built: Path, folder: Path, case: Case, steps: int) -> list[list[str]]:
    """Names of the outputs that are wrong, by step."""
    transport, rank = open_emulated(built, folder, case, timeout_s=30), dist.get_rank()
    found = []
    for step in range(steps):
        ranks = [make_inputs(case, other, seed=step) for other in range(case.ranks)]
        found.append(differing(run_operations(transport, ranks[rank], case), expected_outputs(ranks, case)[rank]))
    transport.check()
    transport.close()
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_exact(built, tmp_path, name):
    for differences in pool(CASES[name].ranks).run(compare, built, tmp_path, CASES[name], 3):
        assert differences == [[], [], []]


def differentiate(built: Path, folder: Path, case: Case) -> list[bool]:
    """Whether y and the gradients through the registered ops equal those over collectives."""
    inputs = make_inputs(case, dist.get_rank())
    results = []
    for transport in (open_emulated(built, folder, case, timeout_s=30), ReferenceTransport(dist.group.WORLD)):
        number = register(transport)
        x, probs = inputs.x.clone().requires_grad_(), inputs.probs.clone().requires_grad_()
        rows, row_probs, counts, map = ops.dispatch(number, x, inputs.experts, probs, case.num_local, case.alignment)
        num_rows = int(counts.sum())
        outputs = (torch.tanh(rows[:num_rows]) * row_probs[:num_rows, None]).to(rows.dtype)
        y = ops.combine(number, outputs, map, inputs.experts, case.num_local)
        y.backward(inputs.grad_y)
        unregister(number)
        transport.close()
        results.append((y.detach(), x.grad, probs.grad))
    return [torch.equal(*pair) for pair in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_the_ops(built, tmp_path, dtype):
    case = Case(ranks=2, top_k=3, num_local=2, tokens=(30, 12), dtype=dtype)
    assert pool(2).run(differentiate, built, tmp_path, case) == [[True] * 3] * 2


def one_stays_away(built: Path, folder: Path, case: Case) -> tuple[str, float]:
    """Rank 1 does not call the second dispatch. The error of this rank, and how long it took."""
    transport, rank = open_emulated(built, folder, case, timeout_s=0.3), dist.get_rank()
    inputs = make_inputs(case, rank)
    arguments = (inputs.x, inputs.experts, inputs.probs, case.num_local, 1)
    transport.dispatch(*arguments)
    transport.check()
    start, message = time.monotonic(), ""
    if rank != 1:
        transport.dispatch(*arguments)
        try:
            transport.check()
        except ScaleMoEError as error:
            message = str(error)
    dist.barrier()
    transport.close()
    return message, time.monotonic() - start


def test_a_rank_that_stays_away_is_named_in_time(built, tmp_path):
    (message, took), (none, _), (other, _) = pool(4).run(one_stays_away, built, tmp_path, Case(ranks=4))[:3]
    assert "ranks [1] did not get to the same operation in time" in message and "[1]" in other and none == ""
    assert took < 10
