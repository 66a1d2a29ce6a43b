"""Distillation losses: each a mean over the batch, with no parameters of its own. Teachers receive no gradient.

Targets are class indices of shape (B,) or class probabilities of shape (B, num_classes), as smoothing and mixup make
them. DKD, NKD, RLD and OFA single out one target class: for them probabilities stand for their most probable class, as
in the code published with OFA-KD for DKD and OFA.
"""

from .adversarial import ADVERSARIAL_LOSSES, adaad_loss, dgad_loss, igdm_loss, swap_logits
from .embeddings import embed_loss, nd_loss, rkd_loss, rsd_loss
from .feature_maps import at_loss, hcl_loss
from .finite import check_finite
from .from_dynamic_teacher import GPD_LOSSES, needs_target
from .logits import (
    dist_loss,
    dkd_loss,
    kd_loss,
    nkd_loss,
    ofa_loss,
    rld_loss,
    soft_target_cross_entropy,
    standardize_logits,
    wttm_loss,
)
from .targets import target_classes

__all__ = [
    'ADVERSARIAL_LOSSES',
    'GPD_LOSSES',
    'adaad_loss',
    'at_loss',
    'check_finite',
    'dgad_loss',
    'dist_loss',
    'dkd_loss',
    'embed_loss',
    'hcl_loss',
    'igdm_loss',
    'kd_loss',
    'nd_loss',
    'needs_target',
    'nkd_loss',
    'ofa_loss',
    'rkd_loss',
    'rld_loss',
    'rsd_loss',
    'soft_target_cross_entropy',
    'standardize_logits',
    'swap_logits',
    'target_classes',
    'wttm_loss',
]
