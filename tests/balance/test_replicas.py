"""What of replicas needs no ranks."""

import torch

from megatron_scalemoe.balance.replicas import LayerReplicas


def test_gradients_of_copies_are_summed_in_the_dtype_of_the_main_gradients():
    parameter = torch.nn.Parameter(torch.ones(1, 1, 1, dtype=torch.bfloat16))
    parameter.main_grad = torch.zeros(1, 1, 1)
    replicas = LayerReplicas.__new__(LayerReplicas)
    replicas.parameters, replicas._gradients = (parameter,), None
    for value in (1.0, 2**-9):
        replicas.add_gradients(torch.full((1, 1, 1), value, dtype=torch.bfloat16))
    assert replicas._gradients[0].item() == 1 + 2**-9
