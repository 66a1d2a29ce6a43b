"""Rules of attention: whole heads are replicated, so scores, softmax, RoPE and q/k norms keep an unchanged head_dim."""
import torch.nn as nn

from .rule import Rule, register_rule


def head_dim(attention: nn.Module) -> int:
    """Entries per head, for classes that do not store it."""
    return attention.qkv.out_features // (3 * attention.num_heads)


register_rule('timm.layers.attention.Attention', Rule(
    multiply=('num_heads', 'attn_dim'),
    blocks={'qkv.out': 'head_dim', 'gate.out': 'head_dim', 'norm.out': 'head_dim', 'proj.in': 'head_dim'},
))

register_rule('timm.models.swin_transformer.WindowAttention', Rule(
    multiply=('num_heads',),
    blocks={'qkv.out': head_dim, 'proj.in': head_dim},
    params={'relative_position_bias_table': 1},
))
