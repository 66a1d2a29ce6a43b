"""Ways of training that are compared: names, and flags behind the configuration of plain training."""

from typing import Dict

__all__ = ['PLAIN', 'SHARED', 'STATIC', 'WAYS', 'family', 'needs_static_teacher']

PLAIN = 'plain'

# What a dynamic teacher can do for its student.
SHARED: Dict[str, str] = {
    'gpd': '--gpd',
    'weight 1': '--gpd --gpd-weight 1',
    'weight falls': '--gpd --gpd-weight-schedule cosine',
    'teacher scale': '--gpd --gpd-scale teacher',
    'balanced': '--gpd --gpd-scale balanced',
    'balanced, share 1/4': '--gpd --gpd-scale balanced --gpd-share-weight 0.25',
    'share 0': '--gpd --gpd-share-weight 0',
    'kl, T = 2': '--gpd --gpd-loss kl --gpd-loss-args temperature=2',
    'kl, standardized': '--gpd --gpd-loss kl --gpd-loss-args temperature=2 standardize=true',
    'dkd': '--gpd --gpd-loss dkd --gpd-weight 1',
    'wttm': '--gpd --gpd-loss wttm --gpd-weight 1',
    'first half': '--gpd --gpd-epochs 0.0-0.5',
    'second half': '--gpd --gpd-epochs 0.5-1.0',
    'last quarter': '--gpd --gpd-epochs 0.75-1.0',
    'noise 0.5': '--gpd --gpd-noise 0.5',
    'ratio 3': '--gpd --gpd-ratio 3',
    'sandwich': '--gpd --gpd-ratio 3 --gpd-method sandwich --gpd-between 1',
    'switch': '--gpd --gpd-switch',
    'gap 0.1, teacher': '--gpd --gpd-gap-target 0.1',
    'gap 0.2, distillation': '--gpd --gpd-gap-target 0.2 --gpd-gap-scales distillation',
    'netaug': '--gpd --gpd-method netaug',
    'netaug, ratio 3': '--gpd --gpd-ratio 3 --gpd-method netaug',
}

# Losses from a static teacher, at their defaults but for what is said here.
_LOSSES: Dict[str, str] = {
    'kd': '',
    'kd, standardized': 'temperature=2 standardize=true',
    'dkd': '',
    'rld': '',
    'nkd': '',
    'wttm': '',
    'dist': '',
    'ofa': '',
    'reviewkd': '',
    'at': '',
    'nd': '',
    'rsd': '',
    'rkd': '',
    'feature': '',
}
_WEIGHTS = (0.1, 1.0, 10.0)  # b: what suits a loss differs by data set


def _static(loss: str, weight: float, flags: str) -> str:
    chosen = f'--kd-distill-type {loss.split(",")[0]}'
    chosen += f' --kd-loss-args {_LOSSES[loss]}' if _LOSSES[loss] else ''
    return f'{chosen} --task-loss-weight 1 --distill-loss-weight {weight} {flags}'


STATIC: Dict[str, str] = {
    f'static {loss}{other}; b = {weight:g}': _static(loss, weight, flags)
    for loss in _LOSSES
    for other, flags in (('', ''), (' + gpd', '--gpd'))
    for weight in _WEIGHTS
}

WAYS: Dict[str, str] = {PLAIN: '', **SHARED, **STATIC}


def family(way: str) -> str:
    """What a way is a variant of: weights of one loss are variants of it."""
    return way.split(';')[0]


def needs_static_teacher(way: str) -> bool:
    """Whether a way distils from a static teacher."""
    return way in STATIC
