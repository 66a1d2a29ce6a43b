"""Reads the checkpoints that the authors of Gap Preserving Distillation released as plain timm students.

Their checkpoints hold the dynamic teacher, in their own format. A channel axis is the student's, repeated r times as a
whole, and activations are divided by r, so the student is the leading 1/r of every axis, and dense weights and biases
are multiplied by r where their outputs are repeated. A multi-branch convolution is a set of ``*orepa*`` tensors that
are sliced one by one and then merged into one kernel (OREPA, arXiv 2204.00826). BatchNorm keeps the student's running
statistics as ``tiny_running_mean`` and ``tiny_running_var``.
"""

import argparse
import pickle
import zipfile
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Tuple

import timm
import torch
from timm.models import clean_state_dict

from ..errors import InputError, first_line
from .rvt import checkpoint_filter_fn as rename_rvt

__all__ = [
    'RELEASES',
    'Release',
    'convert_checkpoint',
    'convert_state_dict',
    'is_release',
    'merge_release_branches',
    'read_release',
]

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Release:
    """One of the authors' models.

    Attributes:
        stem: the convolution on images, whose input axis is not repeated.
        stem_width: its output channels in the student.
        classifier: the layer that gives logits, whose output axis is not repeated.
        rename: the authors' parameter names to timm's.
        model_args: what makes timm's architecture the authors' model.
    """

    stem: str
    stem_width: int
    classifier: str
    rename: Callable[[Dict[str, torch.Tensor]], StateDict]
    model_args: Mapping[str, Any] = field(default_factory=dict)


def _rename_mobilenet(state_dict: StateDict) -> StateDict:
    """From a flat list, ``model.<block>.<layer>``, to stages of blocks."""
    blocks = [f'blocks.{stage}.{block}' for stage, depth in enumerate((1, 2, 2, 6, 2)) for block in range(depth)]
    layers = {'0': 'conv_dw', '1': 'bn1', '3': 'conv_pw', '4': 'bn2'}
    prefixes = {'model.0.0': 'conv_stem', 'model.0.1': 'bn1', 'fc': 'classifier'}
    prefixes.update(
        {f'model.{i}.{layer}': f'{block}.{name}' for i, block in enumerate(blocks, 1) for layer, name in layers.items()}
    )
    renamed = {}
    for name, tensor in state_dict.items():
        prefix, _, key = name.rpartition('.')
        renamed[f'{prefixes.get(prefix, prefix)}.{key}'] = tensor
    return renamed


RELEASES: Dict[str, Release] = {
    'resnet18': Release('conv1', 64, 'fc', rename=dict),
    'mobilenetv1_100': Release('model.0.0', 32, 'fc', _rename_mobilenet, model_args={'act_layer': 'relu'}),
    'rvt_tiny': Release('patch_embed.proj.0', 32, 'head', rename_rvt),
}


def convert_checkpoint(path: str) -> Tuple[str, Dict[str, torch.Tensor]]:
    """Reads an authors' checkpoint as a plain timm student.

    Args:
        path: a ``.pth.tar`` file. Only weights are read: nothing that a pickle says is executed.

    Returns:
        The name of the architecture in timm, a key of :data:`RELEASES`, and its state dict, on the CPU.

    Raises:
        ValueError: if the file cannot be read or is not an authors' checkpoint.
    """
    checkpoint = read_release(path)
    if not is_release(checkpoint):
        raise InputError(
            f"{path} is not a checkpoint of the authors' dynamic teachers: it needs no conversion, or "
            f'is of another model than {", ".join(RELEASES)}'
        )
    return convert_state_dict(checkpoint)


def read_release(path: str) -> Dict[str, Any]:
    """Loads a PyTorch checkpoint, weights only; as in timm, arguments in an ``argparse.Namespace`` are allowed.

    Args:
        path: of the file.

    Returns:
        What it holds, by name, on the CPU.

    Raises:
        ValueError: if the file is missing, truncated or corrupted, or holds more than weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, a file's optimizer state and averaged weights cost no memory.
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f'there is no checkpoint at {path}')
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error):  # the pickle asks for a function or class
            raise InputError(f'{path} holds more than weights, which could run code when loaded: refused')
        raise InputError(f'{path} is not a checkpoint, or is truncated or corrupted')
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise InputError(f'{path} is not a checkpoint, or is truncated or corrupted: {first_line(error)}')
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise InputError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def is_release(checkpoint: Mapping[str, Any]) -> bool:
    """Tells the authors' dynamic teachers from other checkpoints.

    Args:
        checkpoint: what :func:`read_release` gives.

    Returns:
        Whether it has the statistics of a tiny model, which no other has.
    """
    return any(name.endswith('.tiny_running_mean') for name in _weights(checkpoint))


def convert_state_dict(checkpoint: Mapping[str, Any]) -> Tuple[str, Dict[str, torch.Tensor]]:
    """:func:`convert_checkpoint` of a checkpoint that is already loaded.

    Args:
        checkpoint: a checkpoint for which :func:`is_release` is true. Of ``state_dict`` and ``state_dict_ema`` the
            first is read: the published accuracies are its.

    Returns:
        timm's name of the student's architecture, and the student's ``state_dict``.

    Raises:
        ValueError: if the model is none of :data:`RELEASES`, or was trained with fewer branches.
    """
    branches = getattr(checkpoint.get('args'), 'num_branches_orepa', 6)
    if branches != 6:
        raise InputError(f'the checkpoint was trained with num_branches_orepa {branches}, but only 6 can be merged')
    teacher = _weights(checkpoint)
    for architecture, release in RELEASES.items():
        if f'{release.stem}.weight' in teacher and f'{release.classifier}.weight' in teacher:
            student = _read_student(release, teacher)
            with torch.device('meta'):
                expected = timm.create_model(
                    architecture, num_classes=len(teacher[f'{release.classifier}.weight']), **release.model_args
                )
            _check_fits(architecture, student, expected.state_dict())
            return architecture, student
    raise InputError(f"the checkpoint is of none of the authors' released models, {', '.join(RELEASES)}")


def merge_release_branches(branches: StateDict, groups: int = 1) -> torch.Tensor:
    """The merged kernel of six branches: each is a kernel by itself, times its gamma, a row of ``vector``.

    Args:
        branches: tensors of a convolution by OREPA's names, its constants among them.
        groups: groups of the convolution.

    Returns:
        The kernel, (out, in / groups, k, k).
    """
    origin = branches['weight_orepa_origin']
    _, inputs, height, width = origin.shape
    average = branches['weight_orepa_avg_conv'] * branches['weight_orepa_avg_avg']
    frequency = branches['weight_orepa_pfir_conv'] * branches['weight_orepa_prior'][:, None]
    pointwise = (branches['weight_orepa_1x1_kxk_idconv1'] + branches['id_tensor']).reshape(groups, -1, inputs)
    spatial = branches['weight_orepa_1x1_kxk_conv2'].reshape(groups, -1, pointwise.shape[1], height, width)
    sequence = torch.einsum('gti,gothw->goihw', pointwise, spatial)
    depthwise = branches['weight_orepa_gconv_dw'].reshape(groups, inputs, -1, height, width)
    mixing = branches['weight_orepa_gconv_pw'].reshape(groups, -1, inputs, depthwise.shape[2])
    separable = torch.einsum('githw,goit->goihw', depthwise, mixing)
    kernels = (
        origin,
        average,
        frequency,
        sequence.reshape(origin.shape),
        branches['weight_orepa_1x1'],
        separable.reshape(origin.shape),
    )
    return sum(gamma.view(-1, 1, 1, 1) * kernel for gamma, kernel in zip(branches['vector'], kernels))


# Tensors of a multi-branch convolution: the axes that are repeated, and whether values are divided by r. Of a depthwise
# one, axis 1 is not repeated except in ``vector``, and nothing is divided.
_BRANCHES = {
    'weight_orepa_origin': ((0, 1), True),
    'bias_orepa_origin': ((0,), True),
    'weight_orepa_avg_conv': ((0, 1), True),
    'weight_orepa_avg_avg': ((), False),
    'weight_orepa_pfir_conv': ((0, 1), True),
    'weight_orepa_prior': ((0,), False),
    'weight_orepa_1x1_kxk_idconv1': ((0, 1), True),
    'id_tensor': ((0, 1), True),
    'weight_orepa_1x1_kxk_conv2': ((0, 1), True),
    'weight_orepa_1x1': ((0, 1), True),
    'weight_orepa_gconv_dw': ((0,), False),
    'weight_orepa_gconv_pw': ((0, 1), True),
    'vector': ((1,), False),
}

# timm's convolutions before a norm have no bias, a merged kernel has one: the norm takes it.
_NORM_AFTER = {'conv1': 'bn1', 'conv2': 'bn2', 'conv_dw': 'bn1'}


def _weights(checkpoint: Mapping[str, Any]) -> StateDict:
    """The state dict inside a checkpoint, or the checkpoint itself if it is one."""
    for key in ('state_dict', 'state_dict_ema'):
        if isinstance(checkpoint.get(key), Mapping):
            return clean_state_dict(dict(checkpoint[key]))
    return clean_state_dict(dict(checkpoint))


def _read_student(release: Release, teacher: StateDict) -> Dict[str, torch.Tensor]:
    ratio = teacher[f'{release.stem}.weight'].shape[0] // release.stem_width
    modules: Dict[str, Dict[str, torch.Tensor]] = {}
    for name, tensor in teacher.items():
        module, _, key = name.rpartition('.')
        modules.setdefault(module, {})[key] = tensor

    student: Dict[str, torch.Tensor] = {}
    for name, tensors in modules.items():
        try:
            narrow = _read_module(
                tensors,
                in_ratio=1 if name == release.stem else ratio,
                out_ratio=1 if name == release.classifier else ratio,
            )
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{name} of the checkpoint is not laid out as the authors' are: {first_line(error)}")
        student.update((f'{name}.{key}', tensor) for key, tensor in narrow.items())
    student = dict(release.rename(student))

    for name in [name for name in student if name.endswith('.bias')]:
        parent, _, layer = name.removesuffix('.bias').rpartition('.')
        if layer in _NORM_AFTER:
            student[f'{parent}.{_NORM_AFTER[layer]}.running_mean'] -= student.pop(name)
    return student


def _read_module(tensors: StateDict, in_ratio: int, out_ratio: int) -> Dict[str, torch.Tensor]:
    """One layer of the student: the leading part of the teacher's, rescaled where the layer sums over channels."""
    if 'weight_orepa_origin' in tensors:
        depthwise = tensors['weight_orepa_origin'].shape[1] == 1
        branches = {}
        for key, (axes, divided) in _BRANCHES.items():
            if depthwise and key != 'vector':
                axes = axes[:1]
            branch = _narrow(tensors[key], dict.fromkeys(axes, out_ratio))
            branches[key] = branch * out_ratio if divided and not depthwise else branch
        groups = branches['weight_orepa_origin'].shape[0] if depthwise else 1
        return {'weight': merge_release_branches(branches, groups), 'bias': branches['bias_orepa_origin'].clone()}

    if 'tiny_running_mean' in tensors:
        # Before its first step as a student, a norm has the teacher's statistics.
        prefix = '' if tensors['tiny_running_mean'].mean() == 0 else 'tiny_'
        norm = {'num_batches_tracked': tensors['num_batches_tracked'].clone()}
        for key in ('weight', 'bias', 'running_mean', 'running_var'):
            source = tensors[prefix + key if key.startswith('running') else key]
            norm[key] = _narrow(source, {0: out_ratio}).clone()
        return norm

    weight = tensors['weight']
    if weight.dim() == 1:  # LayerNorm
        return {key: _narrow(tensor, {0: out_ratio}).clone() for key, tensor in tensors.items()}
    depthwise = weight.dim() == 4 and weight.shape[1] == 1
    multiplier = 1 if depthwise else out_ratio
    layer = {'weight': _narrow(weight, {0: out_ratio} if depthwise else {0: out_ratio, 1: in_ratio}) * multiplier}
    if 'bias' in tensors:
        layer['bias'] = _narrow(tensors['bias'], {0: out_ratio}) * multiplier
    return layer


def _narrow(tensor: torch.Tensor, ratios: Mapping[int, int]) -> torch.Tensor:
    """The leading 1/ratio of every axis that is given."""
    for axis, ratio in ratios.items():
        tensor = tensor.narrow(axis, 0, tensor.shape[axis] // ratio)
    return tensor


def _check_fits(architecture: str, student: StateDict, expected: StateDict) -> None:
    """Raises a ValueError that names a parameter unless all have the names and shapes of timm's."""
    wrong = [name for name in expected if name not in student or student[name].shape != expected[name].shape]
    wrong += [name for name in student if name not in expected]
    if wrong:
        raise InputError(f'the checkpoint is not of a {architecture}: {wrong[0]} does not fit ({len(wrong)} such)')
