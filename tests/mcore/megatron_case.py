"""Builds MoE layers of Megatron and of ours with the same weights inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

import dataclasses
import functools

import torch

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore import cpu_ranks

cpu_ranks.install()

from megatron.core import parallel_state  # noqa: E402 - cpu_ranks must come first
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_scalemoe.mcore.specs import use_scalemoe  # noqa: E402


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One MoE layer on the ranks of a pool; `options` go to TransformerConfig."""

    ep: int = 2
    tp: int = 1
    expert_tp: int = 1
    experts: int = 8
    top_k: int = 2
    skew: float = 1.0
    dtype: torch.dtype = torch.float32
    baseline: str = "alltoall"
    scalemoe: ScaleMoEConfig = ScaleMoEConfig()  # noqa: RUF009 - frozen
    seq: int = 12
    batch: int = 2
    options: tuple = ()


_layouts: dict[tuple[int, int, int, int], dict] = {}


def initialize(tp: int, ep: int, expert_tp: int, pp: int = 1) -> None:
    """Process groups of these sizes and fresh seeds.

    Making the groups of a layout takes seconds over a file store, and Megatron never frees them. So each layout is made once per process,
    and Megatron's module state is switched between layouts.
    """
    layout = (tp, ep, expert_tp, pp)
    if layout not in _layouts:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp)
        _layouts[layout] = {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name[1:].isupper()}
    vars(parallel_state).update(_layouts[layout])
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)


def transformer_config(case: LayerCase, dispatcher: str, **extra) -> TransformerConfig:
    options = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 32,
        "num_moe_experts": case.experts,
        "moe_router_topk": case.top_k,
        "moe_token_dispatcher_type": dispatcher,
        "tensor_model_parallel_size": case.tp,
        "sequence_parallel": case.tp > 1,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.expert_tp,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "moe_router_load_balancing_type": "none",
        "bf16": case.dtype == torch.bfloat16,
        "params_dtype": case.dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**options, **dict(case.options), **extra})


def make_layer(case: LayerCase, kind: str):
    """`kind` is `scalemoe`, or a Megatron dispatcher type for the stock layer. Weights depend on the case only."""
    config = transformer_config(case, "alltoall" if kind == "scalemoe" else kind)
    spec = get_gpt_layer_local_spec(num_experts=case.experts, moe_grouped_gemm=False)
    if kind == "scalemoe":
        spec = use_scalemoe(spec, case.scalemoe)
    initialize(case.tp, case.ep, case.expert_tp)
    mlp = spec.submodules.mlp
    layer = (build_module(mlp, config=config) if isinstance(mlp, ModuleSpec) else mlp(config=config)).to(case.dtype)
    layer.set_layer_number(1)
    with torch.no_grad():  # make the routing skewed: early experts get larger logits
        bias = -case.skew * torch.arange(1, case.experts + 1, dtype=torch.float32).log()
        layer.router.gating = functools.partial(_biased_gating, layer.router.gating, bias)
    return layer


def _biased_gating(gating, bias, inputs):
    return gating(inputs) * 4 + bias.to(inputs.dtype)


def run_layer(case: LayerCase, kind: str) -> dict[str, torch.Tensor]:
    """Forward and backward of one layer: output, input gradient and every parameter's gradient."""
    layer = make_layer(case, kind)
    generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    x = torch.randn(case.seq, case.batch, 16, generator=generator).to(case.dtype).requires_grad_()
    y, _ = layer(x)
    weights = torch.linspace(0.5, 1.5, 16).to(case.dtype)
    (y * weights).sum().backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients}
