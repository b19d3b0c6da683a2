import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.plan_placement import plan_placement
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.topology_file import save_topology

TOPOLOGY = build_topology("rail_optimized", {"nodes": 2, "gpus_per_node": 2})
COUNTS_LE = np.array([[4000, 40, 30, 20, 10, 0, 0, 0], [10] * 8])
OPTIONS = {"replicas": 4, "cost": CostModel(micro_batches=10**6), "solver": "greedy"}


def test_counts_of_any_shape_lead_to_a_plan(tmp_path):
    save_topology(TOPOLOGY, tmp_path / "t.yaml")
    plan = plan_placement(COUNTS_LE.tolist(), str(tmp_path / "t.yaml"), **OPTIONS)
    assert plan.physical_to_logical.shape == (2, 12)
    for shaped in (np.repeat(COUNTS_LE[:, None] / 4, 4, axis=1), np.repeat(COUNTS_LE[None, :, None] // 4, 4, axis=2)):
        assert plan_placement(shaped, TOPOLOGY, **OPTIONS).num_copies[0, 0] == 4


def test_the_plan_has_eplbs_tables():
    plan = plan_placement(COUNTS_LE, TOPOLOGY, **OPTIONS)
    slots_LEC, copies_LE = plan.logical_to_physical, plan.num_copies
    assert copies_LE[0, 0] == slots_LEC.shape[2] == 4
    assert (copies_LE.sum(axis=1) == (plan.physical_to_logical != EMPTY).sum(axis=1)).all()
    for (layer, expert, copy), slot in np.ndenumerate(slots_LEC):
        assert (slot != EMPTY) == (copy < copies_LE[layer, expert])
        assert slot == EMPTY or plan.physical_to_logical[layer, slot] == expert


@pytest.mark.parametrize("counts", [[1, 2], [["a"]], np.full((1, 8), np.nan), np.zeros((2, 3, 8)), -COUNTS_LE])
def test_other_counts_are_refused(counts):
    with pytest.raises(ScaleMoEError):
        plan_placement(counts, TOPOLOGY)


def test_an_unknown_option_is_named():
    with pytest.raises(ScaleMoEError, match="'solvr' is no option"):
        plan_placement(COUNTS_LE, TOPOLOGY, solvr="greedy")
