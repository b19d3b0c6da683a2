"""The CUDA transport between real ranks, one GPU each, against plain indexing:

torchrun --nproc-per-node 8 -m pytest tests/gpu/test_cuda_ranks.py
"""

import dataclasses
import datetime
import os

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.transports.cuda_memory import open_cuda
from tests.gpu.test_cuda_virtual_ranks import on_gpu, to_cpu
from tests.ops.transports.exchange_cases import Case, differing, expected_outputs, make_inputs, run_operations

pytestmark = pytest.mark.skipif(int(os.environ.get("WORLD_SIZE", "1")) < 2, reason="for several ranks under torchrun")
STRESS_STEPS = int(os.environ.get("SCALEMOE_GPU_STRESS_STEPS", "200"))  # 10000 for a release


@pytest.fixture(scope="module")
def ranks():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=datetime.timedelta(seconds=60))
    yield dist.get_world_size()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_exact(ranks, dtype):
    case = Case(ranks=ranks, top_k=4, num_local=4, tokens=(64, 40), dtype=dtype, columns=512)
    transport = open_cuda(dist.group.WORLD, case.limits, timeout_s=30)
    for step in range(3):
        inputs = [make_inputs(case, rank, seed=step) for rank in range(ranks)]
        outputs = to_cpu(run_operations(transport, on_gpu(inputs[dist.get_rank()]), case))
        assert not differing(outputs, expected_outputs(inputs, case)[dist.get_rank()])
    transport.check()


def test_stress(ranks):
    """The same results in every step, however ranks and streams drift."""
    case = Case(ranks=ranks, top_k=4, num_local=4, tokens=(256, 100), columns=1024, dtype=torch.bfloat16)
    transport = open_cuda(dist.group.WORLD, case.limits, timeout_s=30)
    inputs = [on_gpu(make_inputs(case, dist.get_rank(), seed)) for seed in range(2)]
    first = [to_cpu(run_operations(transport, i, case)) for i in inputs]
    for step in range(STRESS_STEPS):
        if step % 7 == dist.get_rank() % 7:
            torch.cuda._sleep(1_000_000)
        again = run_operations(transport, inputs[step % 2], case)
        if step % 50 == 0:
            num_rows = int(again.tokens_per_expert.sum())
            cut = dataclasses.replace(first[step % 2], rows=first[step % 2].rows[:num_rows])
            cut = dataclasses.replace(cut, row_probs=cut.row_probs[:num_rows], grad_rows=cut.grad_rows[:num_rows])
            assert not differing(to_cpu(again), cut)
    torch.cuda.synchronize()
    transport.check()


def test_a_rank_that_stays_away_is_named(ranks):
    case = Case(ranks=ranks)
    transport = open_cuda(dist.group.WORLD, case.limits, timeout_s=1)
    inputs = on_gpu(make_inputs(case, dist.get_rank()))
    if dist.get_rank() != 1:
        transport.dispatch(inputs.x, inputs.experts, inputs.probs, case.num_local, 1)
        torch.cuda.synchronize()
        with pytest.raises(ScaleMoEError, match=r"ranks \[1\] did not get to the same operation"):
            transport.check()
    dist.barrier()
