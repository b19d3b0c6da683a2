"""The check that plan, trace, topology and model have the same sizes."""

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.plan.placement_plan import PlacementPlan

PLAN = PlacementPlan.contiguous(3, 4, 8)


def test_what_fits_is_accepted_so_far_as_it_is_known():
    check_fit({"the trace": Sizes(3, 4, 8), "plan.json": PLAN, "the topology": Sizes(num_ranks=4), "the model": Sizes(num_experts=8)})


@pytest.mark.parametrize("other", [Sizes(2, 4, 8), Sizes(3, 2, 8), Sizes(3, 4, 16)])
def test_any_other_size_is_refused_by_name(other):
    with pytest.raises(ScaleMoEError, match="the trace must be for the 3 layers, 4 ranks and 8 experts of the plan") as caught:
        check_fit({"the plan": PLAN, "the model": Sizes(num_experts=8), "the trace": other}, "scalemoe plan")
    assert caught.value.found == "{} layers, {} ranks and {} experts".format(*other)
    with pytest.raises(ScaleMoEError, match="4 ranks of the plan"):
        check_fit({"the plan": PLAN, "the topology": Sizes(num_ranks=8)})
