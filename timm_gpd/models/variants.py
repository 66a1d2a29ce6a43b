"""``<arch>_gpd`` for every architecture that timm registers.

Without ``gpd_ratio`` a variant is the plain architecture, ready for distilled weights; with it, its dynamic teacher.
"""
from typing import Any, Callable, Optional

import torch.nn as nn
from timm.models import get_pretrained_cfg, list_models, register_model

from ..dynamic_teacher import expand

__all__ = []  # timm's registry adds the name of every entrypoint

SUFFIX = '_gpd'


def plain_name(model_name: str) -> str:
    """The architecture behind a variant's name, its tag kept; other names, a folder's among them, come back as is."""
    if ':' in model_name:
        return model_name
    arch, dot, tag = model_name.partition('.')
    return arch.removesuffix(SUFFIX) + dot + tag


def _make_entrypoint(arch: str) -> Callable[..., nn.Module]:
    def entrypoint(
            pretrained: bool = False,
            gpd_ratio: Optional[int] = None,
            gpd_branches: Optional[int] = None,
            **kwargs: Any,
    ) -> nn.Module:
        cfg = kwargs.pop('pretrained_cfg', None) or get_pretrained_cfg(arch)
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        if pretrained and not any(overlay.get(source) for source in ('file', 'url', 'hf_hub_id', 'state_dict')):
            raise RuntimeError(
                f'{arch}{SUFFIX} has no published weights: name a file or a Hub repo, as in '
                "pretrained_cfg_overlay=dict(file='student/model.safetensors') or dict(hf_hub_id='me/my-student')")
        from timm import create_model  # looked up here: the architecture's module may register after this one
        student = create_model(arch, pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
        if gpd_ratio is None and gpd_branches is None:
            return student
        return expand(student, 2 if gpd_ratio is None else gpd_ratio, 1 if gpd_branches is None else gpd_branches)

    entrypoint.__name__ = entrypoint.__qualname__ = arch + SUFFIX
    entrypoint.__doc__ = f'{arch} for distilled weights, or with gpd_ratio its dynamic teacher.'
    entrypoint.__module__ = __name__
    return entrypoint


def _register() -> None:
    for arch in list_models():
        if not arch.endswith(SUFFIX):
            globals()[arch + SUFFIX] = register_model(_make_entrypoint(arch))


_register()
