"""PyTorch's own attention: whole heads are replicated, as in the rules of timm's attention."""

from typing import Mapping, Optional

import torch.nn.functional as F

from ...axes import AxisMap
from ..traced import from_parameters, is_own
from ..widening import Widening
from .registry import Call, watch


@watch(
    F.multi_head_attention_forward,
    names=(
        'query',
        'key',
        'value',
        'embed_dim_to_check',
        'num_heads',
        'in_proj_weight',
        'in_proj_bias',
        'bias_k',
        'bias_v',
        'add_zero_attn',
        'dropout_p',
        'out_proj_weight',
        'out_proj_bias',
    ),
)
def multi_head_attention(widening: Widening, call: Call) -> None:
    """``nn.MultiheadAttention``: there are more heads, each as wide as before."""
    out_weight, size = call['out_proj_weight'], call['embed_dim_to_check']
    if not widening.is_new(out_weight):
        return
    head_dim, ratio = size // call['num_heads'], call['query'].shape[-1] // size

    def widen(key: str, axes: Mapping[int, AxisMap], sum_axis: Optional[int] = None) -> None:
        if is_own(call.get(key)):
            call[key] = widening.widen(call[key], axes, sum_axis)

    def heads(count: int) -> AxisMap:
        return AxisMap.uniform(count * size, ratio, head_dim)

    for key, weight in (('query', 'q_proj_weight'), ('key', 'k_proj_weight'), ('value', 'v_proj_weight')):
        weight = weight if is_own(call.get(weight)) else 'in_proj_weight'
        in_map = widening.axis_like(
            call[weight], 'in', call[weight].shape[1], call[key].shape[-1], f'the {key} of an attention'
        )
        if weight != 'in_proj_weight':
            widen(weight, {0: heads(1), 1: in_map}, 1)
    if not call.get('use_separate_proj_weight'):
        widen('in_proj_weight', {0: heads(3), 1: in_map}, 1)
    widen('in_proj_bias', {0: heads(3)})
    widen('bias_k', {2: heads(1)})
    widen('bias_v', {2: heads(1)})
    out_map = widening.out_axis(out_weight, size)
    widen('out_proj_weight', {0: out_map, 1: heads(1)}, 1)
    widen('out_proj_bias', {0: out_map})
    widening.set_sizes(widening.owner(out_weight), in_features=ratio * size, out_features=out_map.teacher_size)
    call['embed_dim_to_check'], call['num_heads'] = ratio * size, ratio * call['num_heads']
    widening.set_sizes(
        widening.running[-1],
        embed_dim=call['embed_dim_to_check'],
        num_heads=call['num_heads'],
        kdim=call['key'].shape[-1],
        vdim=call['value'].shape[-1],
    )


@watch(F.scaled_dot_product_attention, names=('query', 'key', 'value', 'attn_mask'))
def scaled_dot_product_attention(widening: Widening, call: Call) -> None:
    """A mask that is a parameter, such as a bias of positions, has one entry for each head."""
    mask = call.get('attn_mask')
    if from_parameters(mask):
        scores = (*call['query'].shape[:-1], call['key'].shape[-2])
        call['attn_mask'] = widening.widen_to_meet(mask, [scores])
