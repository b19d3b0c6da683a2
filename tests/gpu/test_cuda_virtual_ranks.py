"""The CUDA kernels on one GPU: several virtual ranks on one stream, all pushes before all receives.

Under NVIDIA's checkers:

    compute-sanitizer --tool memcheck  python -m pytest tests/gpu/test_cuda_virtual_ranks.py -k exact
    compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_cuda_virtual_ranks.py -k exact
    compute-sanitizer --tool synccheck python -m pytest tests/gpu/test_cuda_virtual_ranks.py -k exact
"""

import dataclasses
import os

import pytest
import torch

from megatron_scalemoe.ops.transports.cuda import CudaTransport, SymmetricBuffers
from tests.ops.transports.exchange_cases import Case, Inputs, Outputs, differing, expected_outputs, make_inputs

CASES = {
    "fp32": Case(ranks=4, top_k=4, num_local=4, tokens=(300, 200, 0, 77), columns=64),
    "bf16, aligned": Case(ranks=4, top_k=8, num_local=8, tokens=(512, 300), columns=1024, dtype=torch.bfloat16, alignment=16),
    "fp16": Case(ranks=8, top_k=2, num_local=2, tokens=(128, 64), columns=2056, dtype=torch.float16),
    "32 experts of a token": Case(top_k=32, num_local=20, tokens=(90, 50), wanted=2.0, columns=8),
}
STRESS_STEPS = int(os.environ.get("SCALEMOE_GPU_STRESS_STEPS", "200"))  # 10000 for a release


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(getattr(inputs, field.name).cuda() for field in dataclasses.fields(Inputs)))


def to_cpu(outputs: Outputs) -> Outputs:
    return Outputs(*(getattr(outputs, field.name).cpu() for field in dataclasses.fields(Outputs)))


def open_ranks(library, case: Case) -> list[CudaTransport]:
    device = torch.device("cuda", torch.cuda.current_device())
    nbytes = case.limits.buffer_bytes(library, case.ranks)
    buffers = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(case.ranks)]
    pointers = [buffer.data_ptr() for buffer in buffers]
    return [CudaTransport(library, SymmetricBuffers(rank, pointers, buffers.clear), case.limits, 5.0, device) for rank in range(case.ranks)]


def run_all(transports: list[CudaTransport], ranks: list[Inputs], case: Case) -> list[Outputs]:
    """All operations of one step but gather_counts, which waits inside its only kernel; of all ranks on the current stream."""
    num_local, dispatched = case.num_local, []
    pairs = list(zip(transports, ranks, strict=True))
    for transport, i in pairs:
        transport.dispatch_push(i.x, i.experts, i.probs, num_local)
    for transport, i in pairs:
        dispatched.append(transport.dispatch_receive(i.x, i.experts, i.probs, num_local, case.alignment))
    for (transport, i), (*_, map) in zip(pairs, dispatched, strict=True):
        transport.combine_push(i.expert_out, map, i.experts, num_local)
    ys = [transport.combine_receive(i.expert_out, i.experts, num_local)[0] for transport, i in pairs]
    for transport, i in pairs:
        transport.dispatch_push(i.grad_y, i.experts, None, num_local)
    grad_rows = [
        transport.rows_receive(i.grad_y, map, i.experts, num_local, len(rows))
        for (transport, i), (rows, _, _, map) in zip(pairs, dispatched, strict=True)
    ]
    for (transport, i), (*_, map) in zip(pairs, dispatched, strict=True):
        transport.combine_push(i.grad_rows, map, i.experts, num_local, i.grad_row_probs)
    grads = [t.combine_receive(i.grad_rows, i.experts, num_local, i.grad_row_probs) for t, i in pairs]
    gathered = torch.stack([i.counts for i in ranks])
    return [
        Outputs(rows, row_probs, counts, y, grad_row, *grad, gathered)
        for (rows, row_probs, counts, _), y, grad_row, grad in zip(dispatched, ys, grad_rows, grads, strict=True)
    ]


def check(got: list[Outputs], ranks: list[Inputs], case: Case) -> None:
    for rank, (outputs, expected) in enumerate(zip(got, expected_outputs(ranks, case), strict=True)):
        assert not differing(to_cpu(outputs), expected), f"rank {rank}"


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_exact(library, name):
    case = CASES[name]
    transports = open_ranks(library, case)
    for seed in range(3):
        ranks = [make_inputs(case, rank, seed) for rank in range(case.ranks)]
        got = run_all(transports, [on_gpu(inputs) for inputs in ranks], case)
        check(got, ranks, case)
    for transport in transports:
        transport.check()


def test_nothing_waits_for_the_device(library):
    case = CASES["bf16, aligned"]
    transports = open_ranks(library, case)
    ranks = [make_inputs(case, rank) for rank in range(case.ranks)]
    inputs = [on_gpu(i) for i in ranks]
    run_all(transports, inputs, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run_all(transports, inputs, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(got, ranks, case)


def test_a_graph_can_be_replayed_with_other_counts(library):
    case = CASES["fp32"]
    transports = open_ranks(library, case)
    ranks = [make_inputs(case, rank) for rank in range(case.ranks)]
    inputs = [on_gpu(i) for i in ranks]
    run_all(transports, inputs, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_all(transports, inputs, case)
    for seed in range(1, 5):
        ranks = [make_inputs(case, rank, seed) for rank in range(case.ranks)]
        for of_graph, new in zip(inputs, ranks, strict=True):
            for field in dataclasses.fields(Inputs):
                getattr(of_graph, field.name).copy_(getattr(new, field.name))
        graph.replay()
        gathered = torch.stack([i.counts for i in inputs])
        check([dataclasses.replace(outputs, gathered=gathered) for outputs in got], ranks, case)


def test_stress(library):
    """Many steps without looking at the device in between; the last results must be right, and no operation may have failed."""
    case = Case(ranks=4, top_k=4, num_local=4, tokens=(128, 90), columns=256, dtype=torch.bfloat16)
    transports = open_ranks(library, case)
    steps = [[make_inputs(case, rank, seed) for rank in range(case.ranks)] for seed in range(4)]
    inputs = [[on_gpu(i) for i in ranks] for ranks in steps]
    for step in range(STRESS_STEPS):
        got = run_all(transports, inputs[step % 4], case)
        if step % 50 == 0 or step == STRESS_STEPS - 1:
            check(got, steps[step % 4], case)
    for transport in transports:
        transport.check()
