"""timm's architectures: which there are, how they are created, and how they are made small enough to be compared."""

from typing import Any, Dict, List

import timm
import torch
import torch.nn as nn

from ..expansion.images import SMALL_IMAGES

__all__ = [
    'FEWER',
    'OWN_MODULES',
    'REDUCTIONS',
    'count_parameters',
    'create',
    'create_small',
    'small_arguments',
    'timm_modules',
]

OWN_MODULES = ('rvt', 'variants')  # what this package registers is not timm's
# Arguments that make an architecture smaller; the last that fits.
REDUCTIONS: List[Dict[str, Any]] = [{'mlp_ratio': 1 / 16}, {'depth': 2}]
# Fewer or narrower blocks, for what runs a module's smallest architecture many times, where even that is large. In
# types that JSON has.
FEWER: Dict[str, Dict[str, Any]] = {
    'beit': {'depth': 2, 'embed_dim': 192, 'num_heads': 3},
    'byoanet': {'width_factor': 0.25},
    'cait': {'depth': 2},
    'coat': {'serial_depths': [1, 1, 1, 1], 'parallel_depth': 1},
    'convit': {'depth': 3, 'local_up_to_layer': 2},
    'crossvit': {'depth': [[1, 1, 0], [1, 1, 0], [1, 1, 0]]},
    'davit': {'depths': [1, 1, 1, 1], 'embed_dims': [32, 64, 128, 256], 'num_heads': [1, 2, 4, 8]},
    'deepseek_vit': {'depth': 2, 'embed_dim': 192, 'num_heads': 3},
    'densenet': {'block_config': [2, 2, 2, 2]},
    'dpn': {'k_sec': [1, 1, 1, 1]},
    'efficientformer': {'depths': [1, 1, 1, 2]},
    'gemma4_vit': {'depth': 2, 'embed_dim': 192, 'num_heads': 3},
    'hiera': {'stages': [1, 1, 2, 1], 'embed_dim': 48},
    'hieradet_sam2': {'stages': [1, 1, 2, 1], 'global_att_blocks': [3], 'embed_dim': 48},
    'inception_next': {'depths': [1, 1, 1, 1]},
    'mobilenetv5': {'channel_multiplier': 0.25},
    'naflexvit': {'depth': 2, 'embed_dim': 192, 'num_heads': 3},
    'nasnet': {'stem_size': 24, 'num_features': 576},
    'pit': {'depth': [1, 1, 1]},
    'qwen3_vit': {'depth': 2, 'embed_dim': 192, 'num_heads': 3},
    'repvit': {'depth': [1, 1, 1, 1]},
    'res2net': {'layers': [1, 1, 1, 1]},
    'resnetv2': {'layers': [1, 1, 1, 1]},
    'senet': {'layers': [1, 1, 1, 1]},
    'sequencer': {'layers': [1, 1, 1, 1]},
    'sknet': {'layers': [1, 1, 1, 1]},
    'swin_transformer': {'depths': [2, 2, 2, 2], 'embed_dim': 48},
    'swin_transformer_v2': {'depths': [2, 2, 2, 2], 'embed_dim': 48},
    'swin_transformer_v2_cr': {'depths': [2, 2, 2, 2], 'embed_dim': 48},
    'tiny_vit': {'depths': [1, 1, 1, 1]},
    'tnt': {'depth': 2},
    'tresnet': {'layers': [1, 1, 1, 1]},
    'twins': {'depths': [2, 2, 2, 2], 'embed_dims': [32, 64, 128, 256]},
    'vgg': {'mlp_ratio': 1 / 16},
    'vision_transformer_sam': {'depth': 3, 'embed_dim': 192, 'num_heads': 3},
    'visformer': {'depth': [1, 1, 1]},
    'xcit': {'depth': 2},
}


def timm_modules() -> List[str]:
    """Which modules of timm define models.

    Returns:
        Their names, in order.
    """
    return sorted(module for module in timm.list_modules() if module not in OWN_MODULES)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Creates an untrained architecture; one whose default is no classifier gets ten classes.

    Args:
        name: a model name of timm.
        **kwargs: arguments of ``timm.create_model``.

    Returns:
        The model.
    """
    if not timm.models.get_pretrained_cfg_value(name, 'num_classes'):
        kwargs.setdefault('num_classes', 10)
    return timm.create_model(name, **kwargs)


def create_small(name: str, **kwargs: Any) -> nn.Module:
    """Creates an untrained architecture for images as small as its ``img_size`` argument, where it has one, allows.

    Args:
        name: a model name of timm.
        **kwargs: arguments of ``timm.create_model`` but ``img_size``.

    Returns:
        The model, for images of 56 to 128 pixels or of its default size.
    """
    return create(name, **small_arguments(name, **kwargs))


def small_arguments(name: str, **kwargs: Any) -> Dict[str, Any]:
    """Arguments of an architecture for images as small as its ``img_size`` argument, where it has one, allows.

    Args:
        name: a model name of timm.
        **kwargs: arguments of ``timm.create_model`` but ``img_size``.

    Returns:
        The same, with ``img_size`` of 56 to 128 pixels if the architecture runs on such images.
    """
    default = (timm.models.get_pretrained_cfg_value(name, 'input_size') or (3, 224, 224))[-1]
    for size in SMALL_IMAGES:
        if size >= default:
            break
        try:
            with torch.device('meta'), torch.no_grad():
                create(name, img_size=size, **kwargs).eval()(torch.empty(1, 3, size, size))
        except Exception:
            continue
        return {'img_size': size, **kwargs}
    return kwargs


def count_parameters(name: str, **kwargs: Any) -> float:
    """Counts an architecture's parameters without allocating them.

    Args:
        name: a model name of timm.
        **kwargs: arguments of ``timm.create_model``.

    Returns:
        Their number; infinity if the architecture does not take these arguments.
    """
    try:
        with torch.device('meta'):
            return sum(parameter.numel() for parameter in create(name, **kwargs).parameters())
    except Exception:
        return float('inf')
