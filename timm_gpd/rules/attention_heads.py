"""Rules of attention: whole heads are replicated, so scores, softmax, RoPE and q/k norms keep an unchanged head_dim."""

from dataclasses import replace
from typing import Any

import torch.nn as nn

from .context import RuleContext
from .rule import Rule, register_rule


def head_dim(attention: Any) -> int:
    """Entries per head: the module's own attribute, or its projection's outputs over its heads."""
    if isinstance(getattr(attention, 'head_dim', None), int):
        return attention.head_dim
    heads = next(getattr(attention, name) for name in ('num_heads', 'groups', 'heads') if hasattr(attention, name))
    for name, parts in (('qkv', 3), ('kv', 2), ('qk', 2), ('q', 1), ('q_proj', 1), ('wq', 1)):
        projection = getattr(attention, name, None)
        if projection is not None:
            return projection.weight.shape[0] // (parts * heads)
    raise AttributeError(f'{type(attention).__name__} has no projection whose heads could be counted')


HEAD_AXES = (
    'qkv.out',
    'q.out',
    'k.out',
    'v.out',
    'qk.out',
    'kv.out',
    'q_proj.out',
    'k_proj.out',
    'v_proj.out',
    'wq.out',
    'wk.out',
    'wv.out',
    'q_bias',
    'k_bias',
    'v_bias',
    'gate.out',
    'norm.out',
    'proj.in',
    'o_proj.in',
)

# Projections to heads and back. What else counts heads or carries one entry per head is multiplied or replicated.
heads = Rule(
    multiply=('num_heads', 'heads', 'groups', 'num_kv_heads', 'attn_dim', 'kv_dim', 'dim_out', 'o_proj_inpdim'),
    blocks={
        **dict.fromkeys(HEAD_AXES, head_dim),
        **dict.fromkeys(('cpb_mlp.2.out', 'meta_mlp.fc2.out'), 1),  # heads, even if there is only one
    },
    params={
        'q_bias': 0,
        'k_bias': 0,
        'v_bias': 0,
        'relative_position_bias_table': 1,
        'gating_param': 0,
        'temperature': 0,
        'logit_scale': 0,
    },
)
for name in (
    'timm.layers.attention.Attention',
    'timm.layers.attention.AttentionRope',
    'timm.layers.attention_pool2d.AttentionPool2d',
    'timm.layers.attention_pool2d.RotAttentionPool2d',
    'timm.models.beit.Attention',
    'timm.models.cait.ClassAttn',
    'timm.models.cait.TalkingHeadAttn',
    'timm.models.coat.FactorAttnConvRelPosEnc',
    'timm.models.convit.GPSA',
    'timm.models.convit.MHSA',
    'timm.models.crossvit.Attention',
    'timm.models.crossvit.CrossAttention',
    'timm.models.davit.ChannelAttention',
    'timm.models.davit.ChannelAttentionV2',
    'timm.models.davit.WindowAttention',
    'timm.models.edgenext.CrossCovarianceAttn',
    'timm.models.eva.EvaAttention',
    'timm.models.fastvit.Attention',
    'timm.models.gcvit.WindowAttentionGlobal',
    'timm.models.gemma4_vit.Gemma4Attention',
    'timm.models.hiera.MaskUnitAttention',
    'timm.models.hieradet_sam2.MultiScaleAttention',
    'timm.models.metaformer.Attention',
    'timm.models.mvitv2.MultiScaleAttention',
    'timm.models.swin_transformer.WindowAttention',
    'timm.models.swin_transformer_v2.WindowAttention',
    'timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention',
    'timm.models.tnt.Attention',
    'timm.models.twins.LocallyGroupedAttn',
    'timm.models.vision_transformer_relpos.RelPosAttention',
    'timm.models.vision_transformer_sam.Attention',
    'timm.models.visformer.Attention',
    'timm.models.volo.Attention',
    'timm.models.volo.ClassAttention',
    'timm.models.xcit.XCA',
):
    register_rule(name, heads)

# Here `norm` is the norm of the tokens that keys and values are projected from, which are not heads yet.
heads_of_reduced_tokens = replace(
    heads, blocks={target: block for target, block in heads.blocks.items() if target != 'norm.out'}
)
for name in (
    'timm.models.nextvit.EfficientAttention',
    'timm.models.pvt_v2.Attention',
    'timm.models.twins.GlobalSubSampleAttn',
):
    register_rule(name, heads_of_reduced_tokens)

# Heads are the inner axis of what is projected back.
register_rule('timm.models.nest.Attention', Rule(multiply=('num_heads',), blocks={'qkv.out': head_dim}))

# A head of values is two of queries and keys, side by side; all of them share a scalar.
register_rule(
    'timm.layers.diff_attention.DiffAttention',
    Rule(multiply=('num_heads',), blocks=dict.fromkeys(('qkv.out', 'norm.out', 'proj.in'), lambda m: 2 * m.head_dim)),
)

# Every window position of a head has its own weights.
register_rule(
    'timm.models.volo.OutlookAttention',
    Rule(
        multiply=('num_heads',),
        blocks={
            'v.out': lambda m: m.v.out_features // m.num_heads,
            'attn.out': lambda m: m.kernel_size**4,
            'proj.in': lambda m: m.v.out_features // m.num_heads,
        },
    ),
)

# One head of keys and values serves every query.
register_rule(
    'timm.layers.attention2d.MultiQueryAttention2d',
    Rule(
        multiply=('num_heads',),
        blocks={'query.proj.out': 'key_dim', 'output.proj.in': 'value_dim'},
        keep=('key.proj', 'value.proj'),
    ),
)

register_rule(
    'timm.layers.attention_pool.AttentionPoolLatent',
    Rule(
        multiply=('num_heads',),
        blocks={
            **dict.fromkeys(('q.out', 'kv.out', 'proj.in'), head_dim),
            'latent': lambda m: m.head_dim if isinstance(m.q, nn.Identity) else 1,
        },
        params={'latent': 2, 'pos_embed': 1},
    ),
)


def unprojected_scores(rule: RuleContext) -> None:
    """The fused kernel takes its scale from head_dim; this one is a sum over more entries of the same head."""
    rule.set('fused_attn', False)


register_rule(
    'timm.layers.attention_pool.AttentionPoolPrr',
    Rule(multiply=('head_dim', 'out_features'), divide=('scale',), code=unprojected_scores),
)

# Frequencies of every head.
register_rule(
    'timm.layers.pos_embed_sincos.RotaryEmbeddingMixed', Rule(multiply=('num_heads', 'dim'), params={'freqs': 2})
)

# Bias of every head: a table of its own, or a small network whose outputs are heads.
register_rule('timm.models.beit.RelativePositionBias', Rule(params={'relative_position_bias_table': 1}))


def relative_position_bias(rule: RuleContext) -> None:
    """The bias is shaped by (area, area, heads), a tuple of which only the last number counts heads."""
    rule.set('bias_shape', (*rule.module.bias_shape[:-1], rule.module.bias_shape[-1] * rule.ratio))


for name in ('RelPosBias', 'RelPosMlp'):
    register_rule(
        f'timm.layers.pos_embed_rel.{name}',
        Rule(
            multiply=('num_heads',),
            blocks={'mlp.fc2.out': 1},
            params={'relative_position_bias_table': 1},
            code=relative_position_bias,
        ),
    )
register_rule(
    'timm.layers.pos_embed_rel.RelPosBiasTf', Rule(multiply=('num_heads',), params={'relative_position_bias_table': 0})
)

# Query, key and value of one head lie side by side: they are replicated together.
for name in ('timm.models.efficientformer.Attention', 'timm.models.levit.Attention', 'timm.models.tiny_vit.Attention'):
    register_rule(
        name,
        Rule(
            multiply=('num_heads', 'key_attn_dim', 'val_attn_dim', 'out_dim'),
            blocks={'qkv.out': lambda m: 2 * m.key_dim + m.val_dim, 'proj.in': 'val_dim'},
            params={'attention_biases': 0},
        ),
    )
register_rule(
    'timm.models.levit.AttentionDownsample',
    Rule(
        multiply=('num_heads', 'key_attn_dim', 'val_attn_dim'),
        blocks={'q.ln.out': 'key_dim', 'kv.out': lambda m: m.key_dim + m.val_dim, 'proj.in': 'val_dim'},
        params={'attention_biases': 0},
    ),
)
for name in (
    'timm.layers.attention2d.Attention2d',
    'timm.models.maxxvit.Attention2d',
    'timm.models.maxxvit.AttentionCl',
):
    register_rule(
        name,
        Rule(
            multiply=('num_heads',),
            blocks={'qkv.out': lambda m: (3 if m.head_first else 1) * m.dim_head, 'proj.in': 'dim_head'},
        ),
    )


def parallel_block(rule: RuleContext) -> None:
    """One projection gives the hidden layer of the MLP and the heads; another takes heads and hidden layer."""
    module, ratio = rule.module, rule.ratio
    hidden, dim = (size // ratio for size in module.in_split[:2])
    head = dim // (module.num_heads // ratio)
    rule.axis('in_proj.out', (hidden, ratio, 1), (3 * dim, ratio, head))
    rule.axis('out_proj.in', (dim, ratio, head), (hidden, ratio, 1))
    rule.axis('attn_out_proj.in', (dim, ratio, head))


for name in ('ParallelScalingBlock', 'DiffParallelScalingBlock'):
    register_rule(
        f'timm.models.vision_transformer.{name}',
        Rule(multiply=('num_heads', 'in_split'), params={'mlp_bias': 0}, code=parallel_block),
    )
for name in ('timm.models.cpubone.ConvAttention', 'timm.models.lowformer.ConvAttention'):
    register_rule(
        name,
        Rule(
            multiply=('num_heads', 'o_proj_inpdim'),
            blocks={
                'pwise.out': lambda m: m.num_keys * m.head_dim,
                'o_proj.in': 'head_dim',
                # The upsampling is the output projection where there is no other.
                'upsampling.in': lambda m: m.head_dim if isinstance(m.o_proj, nn.Identity) else 1,
            },
        ),
    )
register_rule(
    'timm.models.efficientvit_mit.LiteMLA',
    Rule(
        multiply=('aggreg.*.1.groups',),
        blocks={'qkv.out': lambda m: 3 * m.dim, 'aggreg.out': lambda m: 3 * m.dim, 'proj.in': 'dim'},
    ),
)
register_rule(
    'timm.models.coat.ConvRelPosEnc',
    Rule(
        multiply=('channel_splits',),
        blocks={'conv_list.out': lambda m: m.channel_splits[0] // m.head_splits[0]},
    ),
)
for name in ('Attention2d', 'Attention2dDownsample'):
    register_rule(
        f'timm.models.efficientformer_v2.{name}',
        Rule(
            multiply=('num_heads', 'dh'),
            blocks={
                ('q.proj.out' if name == 'Attention2dDownsample' else 'q.out'): 'key_dim',
                'k.out': 'key_dim',
                'v.out': 'd',
                'v_local.out': 'd',
                'proj.in': 'd',
            },
            params={'attention_biases': 0},
        ),
    )


# One module for each head, so heads cannot be multiplied: the entries of a head are, and scores are sums over them.
register_rule(
    'timm.models.efficientvit_msra.CascadedGroupAttention', Rule(multiply=('key_dim', 'val_dim'), divide=('scale',))
)
register_rule('timm.layers.non_local_attn.NonLocalAttn', Rule(divide=('scale',)))


# One head, whose scores keep their width: those of another width would need another scale.
register_rule('timm.models.iformer.SHMA', Rule(keep=('q', 'k')))
register_rule('timm.models.swiftformer.EfficientAdditiveAttention', Rule(keep=('to_query', 'to_key', 'proj')))


def single_head_values(rule: RuleContext) -> None:
    """One head: its values widen, its query and key do not."""
    module = rule.module
    rule.axis('qkv.out', (2 * module.qk_dim, 1, 1), (module.pdim // rule.ratio, rule.ratio, 1))


register_rule('timm.models.shvit.SHSA', Rule(multiply=('dim', 'pdim'), code=single_head_values))


def separable_values(rule: RuleContext) -> None:
    """The query is a map of one channel."""
    rule.axis('qkv_proj.out', (1, 1, 1), (2 * rule.module.embed_dim // rule.ratio, rule.ratio, 1))


register_rule('timm.models.mobilevit.LinearSelfAttention', Rule(multiply=('embed_dim',), code=separable_values))


# No projection follows, so the output must be replicated plainly: values widen, scores do not.
def halo_values(rule: RuleContext) -> None:
    """Keys and values of one head lie side by side."""
    heads, qk, v = rule.module.num_heads, rule.module.dim_head_qk, rule.module.dim_head_v // rule.ratio
    rule.axis('kv.out', *[(qk, 1, 1), (v, rule.ratio, 1)] * heads)


def bottleneck_values(rule: RuleContext) -> None:
    """Queries and keys of all heads come before the values."""
    rule.axis('qkv.out', (2 * rule.module.dim_out_qk, 1, 1), (rule.module.dim_out_v // rule.ratio, rule.ratio, 1))


def lambda_values(rule: RuleContext) -> None:
    """Queries of all heads and one key come before the values."""
    module = rule.module
    rule.axis('qkv.out', ((module.num_heads + 1) * module.dim_qk, 1, 1), (module.dim_v // rule.ratio, rule.ratio, 1))


register_rule(
    'timm.layers.halo_attn.HaloAttn',
    Rule(multiply=('dim_head_v', 'dim_out_v'), keep=('q', 'pos_embed'), code=halo_values),
)
register_rule(
    'timm.layers.bottleneck_attn.BottleneckAttn',
    Rule(multiply=('dim_head_v', 'dim_out_v'), keep=('pos_embed',), code=bottleneck_values),
)
register_rule(
    'timm.layers.lambda_layer.LambdaLayer', Rule(multiply=('dim_v',), keep=('conv_lambda',), code=lambda_values)
)
register_rule('timm.layers.non_local_attn.BilinearAttnTransform', Rule(keep=('conv1', 'conv_p', 'conv_q')))


# The global query is the residual stream itself, cut into heads: the whole stream is replicated head by head.
def stream_head_dim(model: nn.Module) -> int:
    """Entries per head, which is the same in all stages."""
    return next(head_dim(module) for module in model.modules() if hasattr(module, 'head_dim'))


register_rule('timm.models.gcvit.GlobalContextVit', Rule(blocks={'.in': stream_head_dim, '.out': stream_head_dim}))
