"""The exchange ops on one rank, over the plain-torch twin: schemas, fake shapes, gradients. Several ranks: tests/dispatch."""

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.ops import library
from megatron_scalemoe.ops.transports import registry as transport
from tests.ops.transports import reference

EXPERTS = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 3], [0, 1]], dtype=torch.int32)
NUM_LOCAL = 4


@pytest.fixture
def number(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    number = transport.register(reference.ReferenceTransport(dist.group.WORLD))
    yield number
    transport.unregister(number)
    dist.destroy_process_group()


def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    return x, torch.rand(5, 2, dtype=torch.float64, generator=generator, requires_grad=True)


def test_opcheck(number):
    x, probs = tokens()
    ops = torch.ops.scalemoe
    torch.library.opcheck(ops.dispatch.default, (number, x, EXPERTS, probs, NUM_LOCAL, 2))
    rows, row_probs, _, map = ops.dispatch(number, x, EXPERTS, probs, NUM_LOCAL, 1)
    rows = rows.detach().requires_grad_()
    torch.library.opcheck(ops.combine.default, (number, rows, map, EXPERTS, NUM_LOCAL))
    torch.library.opcheck(ops.combine_backward.default, (number, x.detach(), map, EXPERTS, NUM_LOCAL, rows.shape[0]))
    torch.library.opcheck(ops.dispatch_backward.default, (number, rows.detach(), row_probs.detach(), map, EXPERTS, NUM_LOCAL))
    torch.library.opcheck(ops.gather_counts.default, (number, torch.arange(4)))


def test_gradients(number):
    def there_and_back(x, probs):
        rows, row_probs, _, map = library.dispatch(number, x, EXPERTS, probs, NUM_LOCAL, 3)
        return library.combine(number, rows * rows * row_probs[:, None], map, EXPERTS, NUM_LOCAL)

    assert torch.autograd.gradcheck(there_and_back, tokens())


def test_rows_are_in_expert_order_and_padded(number):
    x, probs = tokens()
    rows, row_probs, tokens_per_expert, _ = library.dispatch(number, x, EXPERTS, probs, NUM_LOCAL, 2)
    assert tokens_per_expert.tolist() == [2, 2, 2, 2]
    order = [0, 4, 1, 4, 0, 3, 3]
    assert torch.equal(rows[:7], x[order])
    assert torch.equal(row_probs[:7], probs[order, [0, 0, 0, 1, 1, 0, 1]])
    assert not rows[7].any()
    assert row_probs[7] == 0


def test_without_loss_through_probs_or_rows(number):
    x, probs = tokens()
    _, row_probs, _, _ = library.dispatch(number, x, EXPERTS, probs, NUM_LOCAL)
    row_probs.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(probs.grad, (EXPERTS >= 0).double())
