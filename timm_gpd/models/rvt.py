"""Robust Vision Transformer (RVT), from 'Towards Robust Vision Transformer' (arXiv 2105.07926).

A convolutional stem, transformer stages over the whole grid without position embedding or class token, feed-forwards
that mix neighbours with a depthwise convolution, and average pooling before the classifier. Parameter names follow
timm's hierarchical models; :func:`checkpoint_filter_fn` renames those of the authors' releases.
"""

import re
from functools import partial
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Type, Union, cast

import torch
import torch.nn as nn
from timm.layers import (
    Attention,
    DropPath,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    to_2tuple,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

from ..errors import InputError
from ..private_timm import checkpoint, feature_take_indices

__all__ = ['RobustVisionTransformer']  # timm's registry adds the name of every entrypoint


class ConvEmbedding(nn.Module):
    """Stem: a strided convolution, max pooling and a patch projection.

    Images (B, C, H, W) become positions (B, D, (H + 1) // 16, (W + 1) // 16).
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        img_size: Union[int, Tuple[int, int]] = 224,
        stem_width: int = 32,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.conv = nn.Conv2d(in_chans, stem_width, kernel_size=7, stride=2, padding=2, **dd)
        self.norm = nn.BatchNorm2d(stem_width, **dd)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.proj = nn.Conv2d(stem_width, embed_dim, kernel_size=4, stride=4, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pool(self.norm(self.conv(x))))


class ConvMlp(nn.Module):
    """Feed-forward with a depthwise 3x3 convolution in its middle, on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, kernel_size=1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, kernel_size=1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        x = self.drop1(self.act(self.bn1(self.fc1(x))))
        x = self.act(self.bn2(self.dwconv(x)))
        x = self.drop2(self.bn3(self.fc2(x)))
        return x.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention over all positions and a feed-forward, both residual and pre-normalised, on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        conv_mlp: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        mlp_layer = ConvMlp if conv_mlp else Mlp
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x).flatten(1, 2)).view(x.shape))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, after a strided depthwise convolution that widens; (B, C, H, W) in and out."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        drop_path: Sequence[float],
        downsample: bool = False,
        device=None,
        dtype=None,
        **block_args,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = (
            nn.Conv2d(in_dim, dim, kernel_size=3, stride=2, padding=1, groups=in_dim, **dd)
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.Sequential(
            *[Block(dim, num_heads, drop_path=drop_path[i], **block_args, **dd) for i in range(depth)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class RobustVisionTransformer(nn.Module):
    """Robust Vision Transformer (arXiv 2105.07926).

    Any image of at least 15 pixels a side has a position in the grid of the first stage; later stages halve it,
    rounding up.

    Args:
        img_size: height and width (pixels) that the model is made for. It runs on others as well.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: pooling before the classifier, '' for none.
        head_dims: width of an attention head in each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; a stage is ``head_dims[i] * num_heads[i]`` wide.
        mlp_ratio: width of the feed-forwards, relative to the stage's.
        conv_mlp: feed-forwards with a depthwise convolution, or without.
        act_layer: activation of the feed-forwards.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the stem.
        proj_drop_rate: dropout after projections and in feed-forwards.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: if ``img_size`` leaves no position in the grid.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        head_dims: Sequence[int] = (32, 32),
        depths: Sequence[int] = (10, 2),
        num_heads: Sequence[int] = (6, 12),
        mlp_ratio: float = 4.0,
        conv_mlp: bool = True,
        act_layer: Type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if min(to_2tuple(img_size)) < 15:
            raise InputError(f'RVT needs images of at least 15 x 15 pixels, but img_size is {img_size}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        dims = [head_dim * heads for head_dim, heads in zip(head_dims, num_heads)]

        self.patch_embed = ConvEmbedding(in_chans, dims[0], img_size, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        drop_path_rates = cast(
            List[List[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        )
        self.feature_info = []
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            stages.append(
                Stage(
                    dims[max(i - 1, 0)],
                    dim,
                    depth,
                    num_heads[i],
                    drop_path_rates[i],
                    downsample=i > 0,
                    mlp_ratio=mlp_ratio,
                    conv_mlp=conv_mlp,
                    act_layer=act_layer,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    **dd,
                )
            )
            self.feature_info += [
                dict(num_chs=dim, reduction=16 * 2**i, module=f'stages.{i}.blocks.{j}') for j in range(depth)
            ]
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=1e-6),
            **dd,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^patch_embed',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^head\.norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: Optional[str] = None,
        reset_other: bool = False,
    ) -> None:
        self.num_classes = num_classes
        # Before timm 1.0.31 the head's reset has no arguments for these two.
        if reset_other:
            self.head.norm = nn.Identity().train(self.training)
        self.head.in_features = self.head.num_features = self.num_features
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward that also returns the outputs of blocks.

        Args:
            x: images (B, C, H, W).
            indices: blocks, counted over all stages: the last n if an int, all if None.
            norm: there is no norm before pooling, so True is refused.
            stop_early: stop after the last block that was asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: return the outputs of the blocks alone.

        Returns:
            The output of :meth:`forward_features` and a list of (B, C, H, W), or the list.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        assert not norm, 'RVT has no norm that fits intermediate features.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.pos_drop(self.patch_embed(x))
        index = 0
        for stage in cast(Iterable[Stage], self.stages):
            if stop_early and index > max_index:
                break
            x = stage.downsample(x).permute(0, 2, 3, 1)
            for block in stage.blocks:
                if stop_early and index > max_index:
                    break
                if stage.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
                if index in take_indices:
                    intermediates.append(x.permute(0, 3, 1, 2))
                index += 1
            x = x.permute(0, 3, 1, 2)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Removes the blocks after the last of ``indices``, and the head."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        info = self.feature_info[max_index]
        _, last_stage, _, last_block = info['module'].split('.')
        self.stages = self.stages[: int(last_stage) + 1]
        stage = cast(Stage, self.stages[-1])
        stage.blocks = stage.blocks[: int(last_block) + 1]
        self.num_features = info['num_chs']
        if prune_norm:
            self.head.norm = nn.Identity()
        if prune_head or max_index < len(self.feature_info) - 1:
            self.reset_classifier(0, '', reset_other=True)  # the head is sized for the last block
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.pos_drop(self.patch_embed(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'^patch_embed\.proj\.0\.', 'patch_embed.conv.'),
        (r'^patch_embed\.proj\.1\.', 'patch_embed.norm.'),
        (r'^patch_embed\.proj\.3\.', 'patch_embed.proj.'),
        (r'^transformers\.', 'stages.'),
        (r'^pools\.(\d+)\.conv\.', lambda match: f'stages.{int(match[1]) + 1}.downsample.'),
        (r'^norm\.', 'head.norm.'),
        (r'^head\.(weight|bias)$', r'head.fc.\1'),
    )
)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: Optional[nn.Module] = None) -> Dict[str, torch.Tensor]:
    """Renames the parameters of the authors' releases; timm's own names stay."""
    state_dict = state_dict.get('model', state_dict)
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed


def _create_rvt(variant: str, pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        RobustVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'min_input_size': (3, 15, 15),
        'pool_size': (14, 14),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'first_conv': 'patch_embed.conv',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        'paper_name': 'Towards Robust Vision Transformer',
        'paper_ids': 'arXiv:2105.07926',
        'origin_url': 'https://github.com/vtddggg/Robust-Vision-Transformer',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'rvt_tiny.untrained': _cfg(pool_size=(7, 7)),
        'rvt_small.untrained': _cfg(),
        'rvt_base.untrained': _cfg(),
    }
)


@register_model
def rvt_tiny(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-Ti: 10 blocks of width 192 and 2 of width 384."""
    model_args = dict(head_dims=(32, 32), depths=(10, 2), num_heads=(6, 12))
    return _create_rvt('rvt_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def rvt_small(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-S: 12 blocks of width 384."""
    model_args = dict(head_dims=(64,), depths=(12,), num_heads=(6,))
    return _create_rvt('rvt_small', pretrained, **dict(model_args, **kwargs))


@register_model
def rvt_base(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-B: 12 blocks of width 768, whose feed-forwards have no convolution."""
    model_args = dict(head_dims=(64,), depths=(12,), num_heads=(12,), conv_mlp=False)
    return _create_rvt('rvt_base', pretrained, **dict(model_args, **kwargs))
