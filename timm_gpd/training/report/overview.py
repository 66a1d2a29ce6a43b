"""What a run trains, and what a step of it is expected to cost."""

from typing import Dict, List, NamedTuple, Optional

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...student_folder.card import MODEL_NAMES
from ...task import GapPreservingTask
from ...task.stored_teacher import stored_teachers
from ...teacher.functional import call_with_parameters
from ..student import InputConfig
from ..task import get_teachers, get_validation_models

__all__ = ['ModelSize', 'count_macs', 'describe', 'expected_cost', 'measure_models']

TAUGHT_BY = ('static teacher', 'EMA teacher')


class ModelSize(NamedTuple):
    """How large a model is.

    Attributes:
        parameters: number of parameters, branches merged.
        macs: multiply-accumulates of a forward pass of one image.
        share: of the steps that run it: ratios may be drawn at random.
    """

    parameters: int
    macs: int
    share: float = 1.0


@torch.no_grad()
def count_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention in a forward pass.

    Args:
        model: runs once, in evaluation mode, and is left in the mode in which it was.
        images: shape (B, in_chans, H, W).

    Returns:
        Their number, for all images together.
    """
    training = model.training
    model.eval()
    # The counter follows gradients, and cannot where a parameter is what a module is called with: there are none here.
    trained = {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    try:
        # The kernels of fused attention are not counted on every device; its matrix products are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call_with_parameters(model, trained, images) if trained else model(images)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def measure_models(task: TrainingTask, input_config: InputConfig) -> Dict[str, ModelSize]:
    """Sizes of what a task runs, on one blank image.

    Args:
        task: any of timm's tasks or of this package's, not compiled.
        input_config: what images the student takes.

    Returns:
        By name: ``'student'``, and where there are, ``'dynamic teacher'``, ratios between, ``'static teacher'`` and
        ``'EMA teacher'``.
    """
    models = {MODEL_NAMES[prefix]: model for prefix, model in get_validation_models(task).items()}
    image = _blank_image(models['student'], input_config)
    sizes = {name: ModelSize(_count(model), count_macs(model, image)) for name, model in models.items()}
    drawn = task.ratios if isinstance(task, GapPreservingTask) else None
    for ratio in drawn.choices if drawn else ():
        share, teacher = drawn.count / len(drawn.choices), task.get_dynamic_teacher()
        if ratio == teacher.plan.ratio:
            sizes['dynamic teacher'] = sizes['dynamic teacher']._replace(share=share)
            continue
        view = teacher.at_ratio(ratio)
        count = sum(tensor.numel() for tensor in view.computed_parameters(torch.contiguous_format).values())
        sizes[f'ratio {ratio}'] = ModelSize(count, count_macs(view, image), share)
    for prefix, teacher in get_teachers(task).items():
        # One with a store computes only what is not there, which nobody knows before.
        macs = 0 if stored_teachers(teacher) else count_macs(teacher, image)
        sizes[MODEL_NAMES[prefix]] = ModelSize(_count(teacher), macs)
    return sizes


def expected_cost(sizes: Dict[str, ModelSize]) -> float:
    """A step's cost over a plain step of the student, expected from multiply-accumulates.

    The backward pass of a model has twice those of its forward pass. Student and wider models run both, static and EMA
    teachers their forward pass. Merging branches, losses and distillers are not counted, nor is the backward pass of a
    static teacher with online modules, at most as many as its forward pass.

    Args:
        sizes: from :func:`measure_models`.

    Returns:
        The ratio, 1 for plain training.
    """
    step = sum((1 if name in TAUGHT_BY else 3) * size.share * size.macs for name, size in sizes.items())
    return step / max(3 * sizes['student'].macs, 1)


def describe(
    task: TrainingTask,
    input_config: InputConfig,
    joint_epochs: Optional[range] = None,
    num_epochs: int = 0,
) -> List[str]:
    """What a person wants to know before a run: the models, their sizes, and what a step and the run will cost.

    Args:
        task: any of timm's tasks or of this package's, not compiled.
        input_config: what images the student takes.
        joint_epochs: indices of those in which a dynamic teacher is trained (default: all).
        num_epochs: epochs of the run.

    Returns:
        The lines of a log.
    """
    sizes = measure_models(task, input_config)
    lines = [f'{"":<15}  {"parameters":>14}  {"MACs per image":>14}']
    lines += [f'{name:<15}  {size.parameters:>14,}  {_short(size.macs):>14}' for name, size in sizes.items()]
    trained = unwrap_model(task.get_trainable_module())
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    lines.append(f'Trained are {count:,} parameters{_what_they_are(task, sizes)}.')
    lines.append(
        f'A step is expected to cost {expected_cost(sizes):.1f} x plain training of the student (an estimate, by MACs).'
        if len(sizes) > 1
        else 'This is plain training.'
    )
    joint = len(range(num_epochs)[slice(joint_epochs.start, joint_epochs.stop)]) if joint_epochs else num_epochs
    if 'dynamic teacher' in sizes and joint < num_epochs:
        alone = {name: size for name, size in sizes.items() if name in ('student', *TAUGHT_BY)}
        cost = (joint * expected_cost(sizes) + (num_epochs - joint) * expected_cost(alone)) / num_epochs
        lines.append(
            f'That is in {joint} of {num_epochs} epochs, and in the others {expected_cost(alone):.1f} x: '
            f'the run is expected to cost {cost:.2f} x plain training of the student.'
        )
    return lines


def _what_they_are(task: TrainingTask, sizes: Dict[str, ModelSize]) -> str:
    parts = ['shared by student and dynamic teacher, branches included'] if 'dynamic teacher' in sizes else []
    if any(name in sizes for name in TAUGHT_BY):
        parts.append('those of the losses from other teachers included')
    return f', {", ".join(parts)}' if parts else ''


def _blank_image(model: nn.Module, input_config: InputConfig) -> torch.Tensor:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return torch.zeros(1, *input_config.input_size, device=parameter.device, dtype=parameter.dtype)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _short(number: int) -> str:
    for unit, name in ((10**9, 'G'), (10**6, 'M'), (10**3, 'k')):
        if number >= unit:
            return f'{number / unit:.2f} {name}'
    return str(number)
