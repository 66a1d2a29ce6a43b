"""Rules of modules that keep sizes as numbers for a layer to come: what they are fused into, or a new classifier."""

from .rule import Rule, register_rule

_KERNEL = 'conv_kxk.0.conv'  # a block without kernels has an identity branch alone, which is depthwise
_block = Rule(
    follow={
        'in_chs': (f'{_KERNEL}.in_channels', 'conv_scale.conv.in_channels', 'identity.num_features'),
        'out_chs': (f'{_KERNEL}.out_channels', 'conv_scale.conv.out_channels', 'identity.num_features'),
        'groups': (f'{_KERNEL}.groups', 'conv_scale.conv.groups', 'identity.num_features'),
    }
)
register_rule('timm.models.byobnet.RepVggBlock', Rule(follow={'groups': 'conv_kxk.conv.groups'}))
register_rule('timm.models.byobnet.MobileOneBlock', _block)
register_rule('timm.models.fastvit.MobileOneBlock', _block)
register_rule(
    'timm.models.fastvit.ReparamLargeKernelConv',
    Rule(
        follow={
            'in_chs': 'large_conv.conv.in_channels',
            'out_chs': 'large_conv.conv.out_channels',
            'groups': 'large_conv.conv.groups',
        }
    ),
)
register_rule('timm.models.fastvit.RepMixer', Rule(follow={'dim': f'mixer.{_KERNEL}.in_channels'}))
register_rule(
    'timm.models.fastvit.RepConditionalPosEnc',
    Rule(follow={'dim': 'pos_enc.in_channels', 'dim_out': 'pos_enc.out_channels', 'groups': 'pos_enc.groups'}),
)
register_rule(
    'timm.models.ghostnet.GhostModuleV3',
    Rule(
        multiply=('out_chs',),
        follow={'in_channels': 'cheap_rpr_conv.0.conv.in_channels', 'groups': 'cheap_rpr_conv.0.conv.groups'},
    ),
)

# Heads of timm, which size a new classifier by these.
register_rule('timm.layers.classifier.ClassifierHead', Rule(follow={'in_features': 'fc.in_features'}))
for name in ('NormMlpClassifierHead', 'ClNormMlpClassifierHead'):
    register_rule(
        f'timm.layers.classifier.{name}',
        Rule(
            follow={
                'in_features': ('pre_logits.fc.in_features', 'fc.in_features'),
                'hidden_size': 'pre_logits.fc.out_features',
                'num_features': 'fc.in_features',
            }
        ),
    )
