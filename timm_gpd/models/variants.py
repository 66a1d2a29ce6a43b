"""``<arch>_gpd`` for every architecture that timm registers.

Without ``gpd_ratio`` a variant is the plain architecture, ready for distilled weights; with it, its dynamic teacher.
Three variants have published weights, the authors' own (v0.1 of https://github.com/guoyongcs/GPD).
"""

import dataclasses
from typing import Any, Callable, Dict, Optional, cast

import torch.nn as nn
from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)

from ..errors import InputError, WeightsError
from ..teacher import expand
from .releases import RELEASES
from .weights import hub_errors, resolve_weights

__all__ = []  # timm's registry adds the name of every entrypoint

SUFFIX = '_gpd'


def plain_name(model_name: str) -> str:
    """The architecture behind a variant's name, its tag kept; other names, a folder's among them, come back as is."""
    if ':' in model_name:
        return model_name
    arch, dot, tag = model_name.partition('.')
    return arch.removesuffix(SUFFIX) + dot + tag


def _cfg(arch: str, file: str, interpolation: str) -> PretrainedCfg:
    """The plain architecture's config with the authors' weights and their evaluation: resize to 256, crop 224."""
    return dataclasses.replace(
        get_pretrained_cfg(arch) or PretrainedCfg(),
        url=f'https://github.com/guoyongcs/GPD/releases/download/v0.1/{file}',
        hf_hub_id=None,
        input_size=(3, 224, 224),
        test_input_size=None,
        crop_pct=0.875,
        test_crop_pct=None,
        interpolation=interpolation,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=1000,
        license=None,
        origin_url='https://github.com/guoyongcs/GPD',
        paper_name='Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher',
        paper_ids='arXiv:2410.04140',
    )


default_cfgs = generate_default_cfgs(
    {
        'resnet18_gpd.dkd_in1k': _cfg('resnet18', 'resnet18_dkd_gpd.pth.tar', 'bilinear'),
        'mobilenetv1_100_gpd.dkd_in1k': _cfg('mobilenetv1_100', 'mobilenet_dkd_gpd.pth.tar', 'bilinear'),
        'rvt_tiny_gpd.dkd_in1k': _cfg('rvt_tiny', 'rvt_tiny_gpd.pth.tar', 'bicubic'),
    }
)


def _make_entrypoint(arch: str) -> Callable[..., nn.Module]:
    variant = arch + SUFFIX

    def entrypoint(
        pretrained: bool = False,
        gpd_ratio: Optional[int] = None,
        gpd_branches: Optional[int] = None,
        **kwargs: Any,
    ) -> nn.Module:
        is_teacher = gpd_ratio is not None or gpd_branches is not None
        if is_teacher and kwargs.get('features_only'):
            raise InputError(
                f'features_only would leave {arch} no logits to distil: create {variant} without it; the '
                "dynamic teacher's forward_intermediates gives its features"
            )
        cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None)
        if not isinstance(cfg, (dict, PretrainedCfg)):
            tag = f'.{cfg}' if cfg else ''
            cfg = get_pretrained_cfg(variant + tag) or _without_weights(get_pretrained_cfg(arch + tag))
        cfg = dataclasses.replace(resolve_pretrained_cfg(arch, cfg, overlay), architecture=arch)
        if pretrained and not (cfg.has_weights or cfg.state_dict):
            raise WeightsError(
                f'{variant} has no published weights ({", ".join(default_cfgs)} have): name a file or a Hub repo, as '
                "in pretrained_cfg_overlay=dict(file='student/model.safetensors') or dict(hf_hub_id='me/my-student')"
            )
        found = resolve_weights(cfg, kwargs.get('cache_dir')) if pretrained else {}
        if 'state_dict' in found:  # converted from a release, whose architecture may differ in an activation
            kwargs = {**RELEASES[arch].model_args, **kwargs}
        with hub_errors(cfg.hf_hub_id if pretrained and not found else None):
            student = create_model(
                arch, pretrained=pretrained, pretrained_cfg=dataclasses.replace(cfg, **found), **kwargs
            )
        for key in found:  # the student's config tells where weights come from; it does not carry them
            config = cast(Dict[str, Any], student.pretrained_cfg)
            config.pop(key)
            if getattr(cfg, key) is not None:
                config[key] = getattr(cfg, key)
        if not is_teacher:
            return student
        return expand(student, 2 if gpd_ratio is None else gpd_ratio, 1 if gpd_branches is None else gpd_branches)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f'{arch} for distilled weights, or with gpd_ratio its dynamic teacher.'
    entrypoint.__module__ = __name__
    return entrypoint


def _without_weights(cfg: Optional[PretrainedCfg]) -> PretrainedCfg:
    """The plain architecture's weights are not the variant's."""
    return dataclasses.replace(cfg or PretrainedCfg(), url=None, hf_hub_id=None, custom_load=False)


def _register() -> None:
    for arch in list_models():
        if not arch.endswith(SUFFIX):
            globals()[arch + SUFFIX] = register_model(_make_entrypoint(arch))


_register()
