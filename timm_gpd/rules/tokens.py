"""Rules of tokens: position embeddings, and axes that are mixed but are not channels."""

from .rule import Rule, register_rule

# Two embeddings are added before they meet the tokens.
register_rule('timm.models.hieradet_sam2.HieraDet', Rule(params={'pos_embed': 1, 'pos_embed_window': 1}))
register_rule('timm.models.gemma4_vit.Gemma4PatchEmbed', Rule(params={'position_embedding_table': 2}))

# Attention over a map of one channel.
register_rule('timm.models.csatv2.SpatialTransformerBlock', Rule(keep=('',)))

# The states are what tokens are summed into and read back from.
register_rule('timm.models.efficientvim.HSMSSD', Rule(multiply=('d_inner',), keep=('BCdt_proj', 'dw')))

# A fixed transform of pixels.
register_rule('timm.models.csatv2.LearnableDct2d', Rule(keep=('transform',)))

# Layers along the token axis.
register_rule('timm.models.mlp_mixer.MixerBlock', Rule(keep=('mlp_tokens',)))
register_rule('timm.models.mlp_mixer.ResBlock', Rule(keep=('linear_tokens',)))
register_rule('timm.models.mlp_mixer.SpatialGatingUnit', Rule(keep=('proj',)))

# Embeddings of rows and columns are added before they meet the tokens.
register_rule('timm.models.naflexvit.NaFlexEmbeds', Rule(params={'pos_embed_y': 2, 'pos_embed_x': 2}))

# Auxiliary classifiers: of patches, and of a middle layer.
register_rule('timm.models.volo.VOLO', Rule(keep=('aux_head',)))
register_rule('timm.models.inception_v3.InceptionAux', Rule(keep=('fc',)))
