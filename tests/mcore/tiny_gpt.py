"""A GPT-MoE, of stock Megatron-Core classes unless asked otherwise, that trains some steps in a second. Imported by pool workers only."""

from __future__ import annotations

import dataclasses

from tests.mcore.megatron_case import initialize  # first: it installs the CPU ranks

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.layers.norm import with_sequence_parallel_norm
from megatron_scalemoe.mcore.specs import use_scalemoe

VOCABULARY, SEQUENCE, GLOBAL_BATCH = 64, 16, 8


@dataclasses.dataclass(frozen=True)
class Setup:
    """How one training run is laid out. The loss does not depend on the layout when dropout is 0 and both start from the same weights."""

    ep: int = 1
    tp: int = 1
    pp: int = 1
    expert_tp: int = 1
    dispatcher: str = "alltoall"
    distributed_optimizer: bool = False
    overlap: bool = False
    bf16: bool = False
    dropout: float = 0.0
    recompute: bool = False
    shared_expert: bool = False
    swiglu: bool = False
    scalemoe_experts: str | None = None  # with a value: ScaleMoE's layers with these experts, instead of stock Megatron's
    scalemoe: ScaleMoEConfig | None = None  # the same with any options
    micro_batches: int = 2
    capacity_factor: float | None = None

    def with_options(self, **options) -> Setup:
        return dataclasses.replace(self, **options)

    seed: int = 1
    experts: int = 8


class Training:
    """The model, optimizer and scheduler of one run. The next one may replace Megatron's groups, so finish with one before it."""

    def __init__(self, setup: Setup):
        self.setup = setup
        initialize(setup.tp, setup.ep, expert_tp=setup.expert_tp, pp=setup.pp)
        torch.manual_seed(setup.seed)
        model_parallel_cuda_manual_seed(setup.seed, force_reset_rng=True)
        self.config = _config(setup)
        self.model = _model(self.config, setup)
        self.optimizer = get_megatron_optimizer(_optimizer_config(setup), [self.model])
        self.scheduler = OptimizerParamScheduler(self.optimizer, 0.0, 1e-2, 1e-3, 2, 20, "cosine", 0.01, 0.01, 0, "constant")
        if setup.overlap:
            self.config.no_sync_func = self.model.no_sync
        self.step = 0
        self.placement = None  # a SequencePlacement

    def losses(self, steps: int) -> list[float]:
        """Trains some steps; the mean loss of the global batch of each, the same number on every rank."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        samples = GLOBAL_BATCH // parallel_state.get_data_parallel_world_size()
        reduced = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_micro_batches(self.step, self.setup.micro_batches, self.placement),
            model=[self.model],
            num_microbatches=self.setup.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=samples // self.setup.micro_batches,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(GLOBAL_BATCH)
        self.step += 1
        total = torch.stack([part["loss"] for part in reduced]).mean() if reduced else torch.zeros(())
        torch.distributed.all_reduce(total)
        last_stage_ranks = torch.distributed.get_world_size() // self.setup.pp
        return total.item() / last_stage_ranks


def _config(setup: Setup) -> TransformerConfig:
    options: dict = dict(pipeline_dtype=torch.float32)
    if setup.bf16:
        options = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
    if setup.recompute:
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if setup.shared_expert:
        options.update(moe_shared_expert_intermediate_size=32, moe_shared_expert_overlap=True)
    if setup.swiglu:
        options.update(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        num_moe_experts=setup.experts,
        moe_router_topk=2,
        moe_expert_capacity_factor=setup.capacity_factor,
        moe_router_load_balancing_type="none",  # the aux loss is one of a rank's own tokens, so it depends on the layout
        moe_token_dispatcher_type=setup.dispatcher,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        expert_model_parallel_size=setup.ep,
        expert_tensor_parallel_size=setup.expert_tp,
        sequence_parallel=setup.tp > 1,
        hidden_dropout=setup.dropout,
        attention_dropout=setup.dropout,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
        **options,
    )


def _model(config: TransformerConfig, setup: Setup) -> DistributedDataParallel:
    spec = with_sequence_parallel_norm(get_gpt_decoder_block_spec(config, use_transformer_engine=False))
    if setup.scalemoe or setup.scalemoe_experts:
        spec = use_scalemoe(spec, setup.scalemoe or ScaleMoEConfig(experts=setup.scalemoe_experts))
    stage = dict(pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage())
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope", share_embeddings_and_output_weights=True, **stage)
    if setup.bf16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=setup.overlap,
        use_distributed_optimizer=setup.distributed_optimizer,
        overlap_param_gather=setup.overlap and setup.distributed_optimizer,
        grad_reduce_in_fp32=setup.bf16,
        bucket_size=5000 if setup.overlap else None,  # several buckets, as large models have
    )
    return DistributedDataParallel(config, ddp_config, model)


def _optimizer_config(setup: Setup) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.01,
        clip_grad=1.0,
        bf16=setup.bf16,
        params_dtype=torch.bfloat16 if setup.bf16 else torch.float32,
        use_distributed_optimizer=setup.distributed_optimizer,
        overlap_param_gather=setup.overlap and setup.distributed_optimizer,
    )


def _micro_batches(step: int, number: int, placement=None):
    """This data-parallel rank's micro-batches of a step: [samples, SEQUENCE + 1] tokens of a learnable pattern."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + stride * torch.arange(SEQUENCE + 1)) % VOCABULARY
    samples = torch.arange(GLOBAL_BATCH).chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    if placement is not None:
        samples = torch.from_numpy(placement.place(tokens[samples, :-1].numpy(), samples.numpy())).flatten()
    return iter(tokens[samples].chunk(number))


def _forward_step(micro_batches, model):
    tokens = next(micro_batches)
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, _mean_loss


def _mean_loss(output: torch.Tensor):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}
