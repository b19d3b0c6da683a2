"""Which optimizer state, saved as flat buffers, is read into which order of experts."""

from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.layout import ExpertOrder, check_optimizer_layout

STOCK = Namespace(moe_dispatcher="stock")
GROUPED = Namespace(moe_dispatcher="scalemoe", scalemoe_experts="grouped", scalemoe_replicas=None)
MOVED = Namespace(**vars(GROUPED), scalemoe_migrate=True)
WROTE = {ExpertOrder.MEGATRON: STOCK, ExpertOrder.STACKED: GROUPED, ExpertOrder.MOVED: MOVED}


@pytest.mark.parametrize("reads", ExpertOrder)
@pytest.mark.parametrize("wrote", ExpertOrder)
def test_flat_buffers_are_read_in_their_own_order_only_and_never_where_experts_have_moved(wrote, reads):
    check_optimizer_layout(Path("x"), "fully_reshardable", WROTE[wrote], reads)
    if wrote == reads != ExpertOrder.MOVED:
        check_optimizer_layout(Path("x"), "dp_reshardable", WROTE[wrote], reads)
    else:
        with pytest.raises(ScaleMoEError, match="lies in the order of"):
            check_optimizer_layout(Path("x"), "dp_reshardable", WROTE[wrote], reads)
