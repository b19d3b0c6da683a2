"""Which options a job's file may have. But for `cluster` the names are the flags of Megatron-LM's training scripts, with underscores.

An option's kind says what YAML must hold: a type, `COUNT` for an integer above 0, `bool` for a flag without value (false: not given), a
tuple of the texts to choose from, or a list with the kind of its items.
"""

from __future__ import annotations

from typing import Any

from megatron_scalemoe.config import ScaleMoEConfig, flag_name
from megatron_scalemoe.typed import plain_kind

COUNT = "count"
Kind = Any

# What trains, and the Python command line that starts it, from the folder where the job is submitted.
PROGRAMS = {
    "megatron_lm": ("-m", "megatron_scalemoe.launch", "{megatron_lm_path}/pretrain_gpt.py"),
    "gpt_moe": ("examples/gpt_moe/pretrain_gpt.py",),
    "bert_moe": ("examples/bert_moe/pretrain_bert.py",),
}

MODEL = {
    "num_layers": COUNT,
    "hidden_size": COUNT,
    "ffn_hidden_size": COUNT,
    "num_attention_heads": COUNT,
    "group_query_attention": bool,
    "num_query_groups": COUNT,
    "kv_channels": COUNT,
    "seq_length": COUNT,
    "max_position_embeddings": COUNT,
    "position_embedding_type": ("learned_absolute", "rope", "relative", "none"),
    "rope_type": ("rope", "yarn"),
    "rotary_base": COUNT,
    "rotary_percent": float,
    "rotary_scaling_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "multi_latent_attention": bool,
    "q_lora_rank": COUNT,
    "kv_lora_rank": COUNT,
    "qk_head_dim": COUNT,
    "qk_pos_emb_head_dim": COUNT,
    "v_head_dim": COUNT,
    "qk_layernorm": bool,
    "normalization": ("LayerNorm", "RMSNorm"),
    "norm_epsilon": float,
    "swiglu": bool,
    "squared_relu": bool,
    "disable_bias_linear": bool,
    "add_qkv_bias": bool,
    "untie_embeddings_and_output_weights": bool,
    "make_vocab_size_divisible_by": COUNT,
    "hidden_dropout": float,
    "attention_dropout": float,
    "init_method_std": float,
    "mtp_num_layers": COUNT,
    "mtp_loss_scaling_factor": float,
    "transformer_impl": ("local", "transformer_engine"),
    "attention_backend": ("flash", "fused", "unfused", "local", "auto"),
    "bf16": bool,
    "fp16": bool,
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
    "recompute_num_layers": COUNT,
    "recompute_modules": [str],
    "no_masked_softmax_fusion": bool,
    "no_bias_gelu_fusion": bool,
    "no_bias_swiglu_fusion": bool,
    "no_bias_dropout_fusion": bool,
    "no_rope_fusion": bool,
    "no_persist_layer_norm": bool,
    "use_cpu_initialization": bool,
}

PARALLEL = {
    "tensor_model_parallel_size": COUNT,
    "pipeline_model_parallel_size": COUNT,
    "context_parallel_size": COUNT,
    "expert_model_parallel_size": COUNT,
    "expert_tensor_parallel_size": COUNT,
    "sequence_parallel": bool,
    "decoder_first_pipeline_num_layers": COUNT,
    "decoder_last_pipeline_num_layers": COUNT,
    "num_layers_per_virtual_pipeline_stage": COUNT,
    "use_distributed_optimizer": bool,
    "overlap_grad_reduce": bool,
    "overlap_param_gather": bool,
    "distributed_backend": ("nccl", "gloo"),
    "distributed_timeout_minutes": COUNT,
}

MOE = {
    "moe_dispatcher": ("scalemoe", "stock"),
    "num_experts": COUNT,
    "moe_layer_freq": str,
    "moe_ffn_hidden_size": COUNT,
    "moe_shared_expert_intermediate_size": COUNT,
    "moe_shared_expert_gate": bool,
    "moe_grouped_gemm": bool,
    "moe_router_topk": COUNT,
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_pre_softmax": bool,
    "moe_router_dtype": ("fp32", "fp64"),
    "moe_router_num_groups": COUNT,
    "moe_router_group_topk": COUNT,
    "moe_router_topk_scaling_factor": float,
    "moe_router_enable_expert_bias": bool,
    "moe_router_bias_update_rate": float,
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"),
    "moe_aux_loss_coeff": float,
    "moe_z_loss_coeff": float,
    "moe_expert_capacity_factor": float,
    "moe_pad_expert_input_to_capacity": bool,
    "moe_token_drop_policy": ("probs", "position"),
    "moe_token_dispatcher_type": ("allgather", "alltoall", "flex"),
    "moe_permute_fusion": bool,
    "moe_per_layer_logging": bool,
}

TRAINING = {
    "micro_batch_size": COUNT,
    "global_batch_size": COUNT,
    "train_iters": COUNT,
    "optimizer": ("adam", "sgd"),
    "lr": float,
    "min_lr": float,
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "lr_decay_iters": COUNT,
    "lr_warmup_iters": int,
    "weight_decay": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_eps": float,
    "clip_grad": float,
    "seed": int,
    "no_gradient_accumulation_fusion": bool,
    "data_path": [str],
    "mock_data": bool,
    "split": str,
    "data_cache_path": str,
    "num_workers": int,
    "tokenizer_type": str,
    "tokenizer_model": str,
    "vocab_size": COUNT,
    "vocab_file": str,
    "merge_file": str,
    "save_interval": COUNT,
    "ckpt_format": ("torch", "torch_dist"),
    "async_save": bool,
    "use_persistent_ckpt_worker": bool,
    "exit_signal_handler": bool,
    "eval_iters": int,
    "eval_interval": COUNT,
    "log_interval": COUNT,
    "log_throughput": bool,
    "wandb_project": str,
    "wandb_exp_name": str,
    "manual_gc": bool,
    "manual_gc_interval": int,
}

# Not flags: what the sbatch script says. Paths are relative to the folder where the job is submitted.
CLUSTER = {
    "nodes": COUNT,
    "gpus_per_node": int,
    "ranks_per_node": COUNT,
    "cpus_per_rank": COUNT,
    "memory": str,
    "time": str,
    "job_name": str,
    "partition": str,
    "account": str,
    "qos": str,
    "seconds_to_save": COUNT,
    "run_dir": str,
    "environment": ("venv", "pyxis", "apptainer"),
    "venv": str,
    "container": str,
    "mounts": [str],
    "megatron_lm_path": str,
}


SCALEMOE = {name: plain_kind(field.annotation) for name, field in ScaleMoEConfig.model_fields.items()}
SECTIONS = {"model": MODEL, "parallel": PARALLEL, "moe": MOE, "training": TRAINING, "scalemoe": SCALEMOE, "cluster": CLUSTER}

REQUIRED = (
    ("model", "num_layers"),
    ("model", "hidden_size"),
    ("model", "num_attention_heads"),
    ("model", "seq_length"),
    ("training", "train_iters"),
    ("training", "global_batch_size"),
    ("training", "lr"),
)

DEFAULTS = {
    ("parallel", "tensor_model_parallel_size"): 1,
    ("parallel", "pipeline_model_parallel_size"): 1,
    ("parallel", "expert_model_parallel_size"): 1,
    ("training", "micro_batch_size"): 1,
    ("training", "save_interval"): 1000,
    ("cluster", "nodes"): 1,
    ("cluster", "gpus_per_node"): 8,
    **{("scalemoe", name): field.default for name, field in ScaleMoEConfig.model_fields.items() if field.default not in (None, False)},
}


def flag_of(section: str, option: str) -> str | None:
    """`--num-layers`, `--scalemoe-replicas`; None for what is no flag."""
    if section == "cluster":
        return None
    return flag_name(option) if section == "scalemoe" else "--" + option.replace("_", "-")


def kind_text(kind: Kind) -> str:
    """What an option of this kind must be, for people."""
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    if isinstance(kind, list):
        return f"a list, each {kind_text(kind[0])}"
    return {COUNT: "an integer, 1 or more", int: "an integer, 0 or more", float: "a number", str: "text", bool: "true or false"}[kind]


def fits(value: object, kind: Kind) -> bool:
    """Whether a value from YAML is of this kind. An integer is a number; true and false are neither."""
    if isinstance(kind, tuple):
        return value in kind
    if isinstance(kind, list):
        return isinstance(value, list) and bool(value) and all(fits(item, kind[0]) for item in value)
    if kind is bool or kind is str:
        return isinstance(value, kind)
    number = isinstance(value, int if kind in (COUNT, int) else (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300 and (kind is float or value >= (kind == COUNT))
