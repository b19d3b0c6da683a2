"""The sections of a job's file. But for `cluster` and `scalemoe`, whatever they hold is a flag of the training script, with underscores.

Megatron's own parser knows its flags (`job.flag_check`). Named here are those that `job.checks` compares with each other, or that have a
default of ours.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from megatron_scalemoe.typed import Model, Number, SchemaVersion, refused

# What trains, and the Python command line that starts it, from the folder where the job is submitted.
PROGRAMS = {
    "megatron_lm": ("-m", "megatron_scalemoe.launch", "{megatron_lm_path}/pretrain_gpt.py"),
    "gpt_moe": ("examples/gpt_moe/pretrain_gpt.py",),
    "bert_moe": ("examples/bert_moe/pretrain_bert.py",),
}
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*", re.IGNORECASE)
# Of an #SBATCH line, where a space begins the next option.
_SBATCH_WORD = re.compile(r"[\w.,:%+@/=\[\]-]+")
Count = Annotated[int, Field(ge=1)]


def _one_word(value: str) -> str:
    if not _SBATCH_WORD.fullmatch(value):
        raise refused("must be one word for SLURM", found=repr(value)[:80], try_="letters, digits and . , : - _")
    return value


Word = Annotated[str, AfterValidator(_one_word)]


class FlagSection(Model):
    """Flags: true for one without value, false for one that is not given, a list for one with several values."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _are_flags(self) -> FlagSection:
        for name, value in (self.model_extra or {}).items():
            if not _NAME.fullmatch(name):
                plain = name.lstrip("-").replace("-", "_")
                raise refused("must be a flag's name with underscores, without dashes", field=(name,), try_=plain)
            if not all(isinstance(item, bool | int | float | str) for item in (value if isinstance(value, list) else [value])):
                raise refused("must be a number, text, true or false, or a list of them", field=(name,), found=repr(value)[:80])
        return self


class ModelSection(FlagSection):
    num_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    seq_length: Count
    kv_channels: Count | None = None
    multi_latent_attention: bool = False
    group_query_attention: bool = False
    num_query_groups: Count | None = None
    max_position_embeddings: Count | None = None
    bf16: bool = False
    fp16: bool = False


class ParallelSection(FlagSection):
    tensor_model_parallel_size: Count
    pipeline_model_parallel_size: Count
    context_parallel_size: Count = 1
    expert_model_parallel_size: Count
    expert_tensor_parallel_size: Count | None = None
    sequence_parallel: bool = False
    decoder_first_pipeline_num_layers: Count | None = None
    decoder_last_pipeline_num_layers: Count | None = None
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class MoeSection(FlagSection):
    moe_dispatcher: Literal["scalemoe", "stock"] | None = None
    num_experts: Count | None = None
    moe_router_topk: Count = 2
    moe_router_num_groups: Count | None = None
    moe_router_group_topk: Count = 1
    moe_token_dispatcher_type: str | None = None


class TrainingSection(FlagSection):
    micro_batch_size: Count
    global_batch_size: Count
    train_iters: Count | None = None
    train_samples: Count | None = None
    lr: Number
    min_lr: Number = 0.0
    mock_data: bool = False
    data_path: list[str] | None = None
    save_interval: Count

    @model_validator(mode="after")
    def _ends(self) -> TrainingSection:
        if (self.train_iters is None) == (self.train_samples is None):
            raise refused("must have one of train_iters and train_samples", try_="train_iters: 1000")
        return self


class ClusterSection(Model):
    """Not flags: what the sbatch script says. Paths are relative to the folder where the job is submitted."""

    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=0)]
    ranks_per_node: Count | None = None
    cpus_per_rank: Count | None = None
    memory: Word | None = None
    time: Word | None = None
    job_name: Word
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    seconds_to_save: Count = 300
    run_dir: str | None = None
    environment: Literal["venv", "pyxis", "apptainer"] | None = None
    venv: str | None = None
    container: str | None = None
    mounts: list[str] = Field(default_factory=list)
    megatron_lm_path: str | None = None


class JobFile(Model):
    """All of a job's file, with its base's values and with defaults."""

    schema_version: SchemaVersion
    program: Literal["megatron_lm", "gpt_moe", "bert_moe"]
    model: ModelSection
    parallel: ParallelSection
    moe: MoeSection
    training: TrainingSection
    scalemoe: dict[str, Any]
    cluster: ClusterSection
    extra_flags: list[str]


FLAG_SECTIONS: dict[str, type[FlagSection]] = {
    "model": ModelSection,
    "parallel": ParallelSection,
    "moe": MoeSection,
    "training": TrainingSection,
}
SECTIONS = (*FLAG_SECTIONS, "scalemoe", "cluster")
