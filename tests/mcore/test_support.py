"""What does not go with ours, of a model and of Megatron-LM's scripts: each is named, with the way out."""

import argparse

import torch

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from tests.rank_pool import pool

MODELS = {
    (): "",
    (("add_bias_linear", True),): "--disable-bias-linear",
    (("moe_ffn_hidden_size", 22),): "--moe-ffn-hidden-size 22",
    (("hidden_size", 20), ("bf16", True), ("params_dtype", torch.bfloat16)): "--hidden-size 20",
    (("moe_apply_probs_on_input", True),): "--moe-apply-probs-on-input and --moe-router-topk 2",
    (("gated_linear_unit", True), ("bias_activation_fusion", True)): "--no-bias-gelu-fusion",
}


def refusals_of_models() -> list[str]:
    from tests.mcore.megatron_case import LayerCase, transformer_config

    # isort: split
    from megatron_scalemoe.mcore.support import check_supported

    configs = [transformer_config(LayerCase(options=options), "alltoall") for options in MODELS]
    return [refusal(check_supported, config, ScaleMoEConfig(experts="grouped")) for config in configs]


def refusal(check, *arguments) -> str:
    try:
        check(*arguments)
    except ScaleMoEError as error:
        return str(error)
    return ""


def test_models_that_grouped_experts_cannot_compute():
    for message, flag in zip(pool(2).run(refusals_of_models)[0], MODELS.values(), strict=True):
        assert flag in message if flag else message == ""


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
SCRIPTS = [
    (PLAIN, {}, ""),
    (REPLICAS, {}, ""),
    (AFFINITY, {}, ""),
    (HISTORY, {"num_workers": 0}, ""),
    (PLAIN, {"ckpt_format": "torch", "tensor_model_parallel_size": 2, "dataloader_type": "cyclic", "moe_use_upcycling": True}, ""),
    (REPLICAS, {"ckpt_format": "torch", "save": None}, ""),
    (PLAIN, {"num_experts": None}, "no MoE layer"),
    (PLAIN, {"use_legacy_models": True}, "--use-legacy-models"),
    (PLAIN, {"use_torch_fsdp2": True}, "use --use-distributed-optimizer"),
    (PLAIN, {"perform_rl_step": True}, "--perform-rl-step"),
    (REPLICAS, {"non_persistent_ckpt_type": "local"}, "use global"),
    (REPLICAS, {"ckpt_format": "torch_dcp", "save": None, "load": "checkpoints"}, "--ckpt-format torch_dcp"),
    (REPLICAS, {"moe_use_upcycling": True}, "--moe-dispatcher stock first"),
    (AFFINITY, {"tensor_model_parallel_size": 2}, "(2, 1, 1)"),
    (AFFINITY, {"rampup_batch_size": [8, 8, 100]}, "--rampup-batch-size"),
    (AFFINITY, {"sft": True}, "remove them"),
    (HISTORY, {}, "add --num-workers 0"),
    (AFFINITY, {"inprocess_restart": True, "use_legacy_models": True, "dataloader_type": "external"}, "use single"),
]


def refusals_of_scripts() -> list[str]:
    from tests.mcore import megatron_case  # noqa: F401 - installs the CPU ranks

    # isort: split
    from megatron_scalemoe.mcore.support import check_script

    return [refusal(check_script, argparse.Namespace(**{**DEFAULTS, **changes}), scalemoe) for scalemoe, changes, _ in SCRIPTS]


def test_arguments_of_scripts():
    messages = pool(2).run(refusals_of_scripts)[0]
    for message, (_, changes, expected) in zip(messages, SCRIPTS, strict=True):
        assert expected in message if expected else message == "", changes
    assert messages[-1].count("\n  - ") == 3, "all problems at once"
