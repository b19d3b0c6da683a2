import pytest

from megatron_scalemoe.cost.model import CostModel


def test_constants_by_hand():
    cost = CostModel(hidden_size=10, ffn_hidden_size=20, gpu_TFLOPs=2.0, bytes_per_value=2, overlap=0.25)
    assert (cost.row_bytes, cost.expert_parameters, cost.expert_bytes) == (20, 3 * 10 * 20, 2 * 3 * 10 * 20)
    assert cost.replaced(gated=False).expert_parameters == 2 * 10 * 20
    # two operations per parameter forward, four backward
    assert cost.compute_us_per_row == pytest.approx(6 * 600 / 2e6)
    assert cost.layer_us(8.0, 4.0) == cost.layer_us(4.0, 8.0) == 8.0 + 4.0 - 0.25 * 4.0
