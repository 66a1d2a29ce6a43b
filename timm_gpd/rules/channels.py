"""Rules of stored channel counts: split sizes, slices, and channels whose neighbours matter."""

from .context import RuleContext
from .rule import Rule, register_rule

# Numbers of channels that a forward splits or slices by.
for name, attributes in {
    'timm.layers.mixed_conv2d.MixedConv2d': ('splits', 'in_channels', 'out_channels'),
    'timm.models.cspnet.CrossStage': ('expand_chs',),
    'timm.models.cspnet.CrossStage3': ('expand_chs',),
    'timm.models.dla.DlaBottle2neck': ('width',),
    'timm.models.dpn.DualPathBlock': ('num_1x1_c', 'inc'),
    'timm.models.fasternet.Partial_conv3': ('dim_conv3', 'dim_untouched'),
    'timm.models.ghostnet.GhostModule': ('out_chs',),
    'timm.models.ghostnet.GhostModuleV2': ('out_chs',),
    'timm.models.inception_next.InceptionDWConv2d': ('split_indexes',),
    'timm.models.mambaout.GatedConvBlock': ('split_indices',),
    'timm.models.res2net.Bottle2neck': ('width',),
    'timm.models.rexnet.LinearBottleneck': ('in_channels', 'out_channels'),
    'timm.models.tnt.PixelEmbed': ('in_dim',),
    'timm.layers.selective_kernel.SelectiveKernel': ('in_channels', 'out_channels'),
}.items():
    register_rule(name, Rule(multiply=attributes))

# Pixels of a patch become channels, those of one channel side by side.
register_rule(
    'timm.models.deepseek_vit.DeepseekVitAligner',
    Rule(multiply=('hidden_size',), blocks={'fc1.in': lambda m: m.downsample_ratio**2}),
)

# A fixed blur, one copy for each channel.
register_rule('timm.layers.blur_pool.BlurPool2d', Rule(multiply=('channels',), params={'filt': 0}))

# A convolution along the channel axis: the next channel is `ratio` entries away.
register_rule(
    'timm.layers.eca.EcaModule', Rule(multiply=('conv.dilation', 'conv.padding', 'conv2.dilation', 'conv2.padding'))
)
register_rule('timm.layers.eca.CecaModule', Rule(multiply=('conv.dilation', 'padding')))


def focal_gates(rule: RuleContext) -> None:
    """Query and context widen; the gates of the focal levels are masks, one channel each."""
    query, context, gates = rule.module.input_split
    rule.set('input_split', [query * rule.ratio, context * rule.ratio, gates])
    rule.axis('f.out', (query + context, rule.ratio, 1), (gates, 1, 1))


register_rule('timm.models.focalnet.FocalModulation', Rule(code=focal_gates))


def scale_shape(rule: RuleContext) -> None:
    """The scale is viewed in this shape; its first axis is the channels."""
    channels, *rest = rule.module.shape
    rule.set('shape', (channels * rule.ratio, *rest))


register_rule('timm.models.metaformer.Scale', Rule(params={'scale': 0}, code=scale_shape))
