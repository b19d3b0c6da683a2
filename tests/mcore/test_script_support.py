"""Arguments of Megatron-LM's scripts that do not go with ours: each is named, with the way out."""

import argparse

import pytest

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.scripts.support import check_script

DEFAULTS = dict(
    num_experts=8,
    use_legacy_models=False,
    use_megatron_fsdp=False,
    use_torch_fsdp2=False,
    inprocess_restart=False,
    perform_rl_step=False,
    ckpt_format="torch_dist",
    non_persistent_ckpt_type=None,
    save="checkpoints",
    load=None,
    moe_use_upcycling=False,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    context_parallel_size=1,
    dataloader_type="single",
    rampup_batch_size=None,
    full_validation=False,
    sft=False,
    hybrid_context_parallel=False,
    num_workers=2,
)
PLAIN, REPLICAS = ScaleMoEConfig(), ScaleMoEConfig(replicas=2)
AFFINITY, HISTORY = ScaleMoEConfig(sequence_placement="affinity"), ScaleMoEConfig(sequence_placement="history")


@pytest.mark.parametrize(
    ("scalemoe", "changes"),
    [
        (PLAIN, {}),
        (REPLICAS, {}),
        (AFFINITY, {}),
        (HISTORY, {"num_workers": 0}),
        (PLAIN, {"ckpt_format": "torch", "tensor_model_parallel_size": 2, "dataloader_type": "cyclic", "moe_use_upcycling": True}),
        (REPLICAS, {"ckpt_format": "torch", "save": None}),
    ],
)
def test_supported(scalemoe, changes):
    check_script(argparse.Namespace(**{**DEFAULTS, **changes}), scalemoe)


@pytest.mark.parametrize(
    ("scalemoe", "changes", "message"),
    [
        (PLAIN, {"num_experts": None}, "no MoE layer"),
        (PLAIN, {"use_legacy_models": True}, "--use-legacy-models"),
        (PLAIN, {"use_torch_fsdp2": True}, "use --use-distributed-optimizer"),
        (PLAIN, {"inprocess_restart": True}, "--inprocess-restart"),
        (PLAIN, {"perform_rl_step": True}, "--perform-rl-step"),
        (REPLICAS, {"ckpt_format": "torch"}, "use torch_dist"),
        (REPLICAS, {"non_persistent_ckpt_type": "local"}, "use global"),
        (REPLICAS, {"ckpt_format": "torch_dcp", "save": None, "load": "checkpoints"}, "--ckpt-format torch_dcp"),
        (REPLICAS, {"moe_use_upcycling": True}, "--moe-dispatcher stock first"),
        (AFFINITY, {"tensor_model_parallel_size": 2}, "(2, 1, 1)"),
        (AFFINITY, {"pipeline_model_parallel_size": 2}, "(1, 2, 1)"),
        (AFFINITY, {"dataloader_type": "cyclic"}, "use single"),
        (AFFINITY, {"rampup_batch_size": [8, 8, 100]}, "--rampup-batch-size"),
        (AFFINITY, {"sft": True}, "remove them"),
        (HISTORY, {}, "add --num-workers 0"),
    ],
)
def test_refused(scalemoe, changes, message):
    with pytest.raises(ScaleMoEError, match="does not support this run") as raised:
        check_script(argparse.Namespace(**{**DEFAULTS, **changes}), scalemoe)
    assert message in str(raised.value)


def test_all_problems_at_once():
    changes = {"inprocess_restart": True, "use_legacy_models": True, "dataloader_type": "external"}
    with pytest.raises(ScaleMoEError) as raised:
        check_script(argparse.Namespace(**{**DEFAULTS, **changes}), AFFINITY)
    assert str(raised.value).count("\n  - ") == 3
