"""A hybrid model's spec for `pretrain_mamba.py --spec`, of layers that need no Transformer Engine; it has no Mamba layers."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

_ATTENTION = ModuleSpec(
    module=SelfAttention,
    params={"attn_mask_type": AttnMaskType.causal},
    submodules=SelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear),
)
_MOE = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
_SUBMODULES = {
    "attention_layer": TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm, self_attention=_ATTENTION, self_attn_bda=get_bias_dropout_add
    ),
    "moe_layer": TransformerLayerSubmodules(pre_mlp_layernorm=WrappedTorchNorm, mlp=_MOE, mlp_bda=get_bias_dropout_add),
}
hybrid_spec = ModuleSpec(
    module=MambaStack,
    submodules=MambaStackSubmodules(
        **{name: ModuleSpec(module=TransformerLayer, submodules=submodules) for name, submodules in _SUBMODULES.items()}
    ),
)
