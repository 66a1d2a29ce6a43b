"""The last check before a dynamic teacher is handed out: the student inside it is the student that it was made from."""

import copy
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import UnsupportedModelError
from ..expansion.copies import plain_copy
from ..expansion.images import run_on_small_images
from ..expansion.verify import outputs_of
from .dynamic_teacher import DynamicTeacher

__all__ = ['gradient_pairs', 'gradients_of', 'rehearse']

ROUNDING = 4  # square roots of an epsilon, relative to a tensor's largest entry: other kernels, merged branches
Pair = Tuple[str, Optional[torch.Tensor], Optional[torch.Tensor]]


def rehearse(dynamic_teacher: DynamicTeacher, student: nn.Module) -> None:
    """Runs what is about to be handed out, where the check in float64 ran what was planned.

    In evaluation mode, on one small image: the student inside gives the student's logits, its loss gives the tensors
    that are stored the student's gradients, and the extracted student has the student's state. Models on a GPU are
    copied to the CPU for that: convolutions there round to TensorFloat32, by a thousandth and for each memory format
    otherwise, as much as some errors are. Steps, checkpoints and copies are gone through by
    ``python -m timm_gpd.coverage``, with architectures of every module of timm.

    Args:
        dynamic_teacher: what :func:`timm_gpd.expand` has built. It is afterwards as it was before.
        student: what it was built from. It is not modified. Gradients are not compared if it does not run backward in
            evaluation mode.

    Raises:
        UnsupportedModelError: if something differs by more than rounding; names it.
    """
    plain = plain_copy(student).eval()
    if any(tensor.device.type != 'cpu' for tensor in plain.state_dict().values()):
        plain, dynamic_teacher = plain.cpu(), copy.deepcopy(dynamic_teacher).cpu()
    mode = dynamic_teacher.training
    dynamic_teacher.eval()
    try:
        with torch.random.fork_rng():
            for what, actual, expected in _pairs(dynamic_teacher, plain):
                if not _agree(actual, expected):
                    raise UnsupportedModelError(
                        f'{type(plain).__name__} cannot be trained inside a dynamic teacher: {what} there is not what '
                        'it is in the student alone; a rule for one of its modules is missing or wrong'
                    )
    finally:
        dynamic_teacher.train(mode)


def _pairs(dynamic_teacher: DynamicTeacher, plain: nn.Module) -> Iterator[Pair]:
    """What is compared: in words, inside the dynamic teacher, in the student alone."""
    x, output = run_on_small_images(plain, plain, dynamic_teacher.plan.input_shape, batch=1)
    output_inside = dynamic_teacher.joint(x).student
    for logits_inside, logits in zip(outputs_of(output_inside), outputs_of(output)):
        yield 'the output', logits_inside, logits
    own = {name: tensor for name, tensor in plain.named_parameters() if tensor.requires_grad}
    try:
        gradients = gradients_of(output, own)
    except RuntimeError:
        gradients = {}
    for name, inside, gradient in gradient_pairs(dynamic_teacher, output_inside, gradients):
        yield f'the gradient of {name}', inside, gradient
    state = plain.state_dict()
    for name, tensor in dynamic_teacher.extract_student().state_dict().items():
        yield name, tensor, state.get(name)


def gradient_pairs(
    dynamic_teacher: DynamicTeacher,
    output: object,
    gradients: Mapping[str, Optional[torch.Tensor]],
) -> Iterator[Pair]:
    """What the student's loss gives the tensors that are stored, beside what it gives the student alone.

    Args:
        dynamic_teacher: the dynamic teacher.
        output: what the student inside it made of some images.
        gradients: from :func:`gradients_of` what the student alone made of them, by name.

    Yields:
        Name, gradient of replica 0 in the student's convention, and the student's own; None where there is none.
        Kernels that have branches are left out.
    """
    stored = dict(dynamic_teacher.wide.named_parameters())
    inside = gradients_of(output, {name: stored[name] for name in gradients if name in stored})
    for name, gradient in inside.items():
        tensor_map = dynamic_teacher.plan.tensors.get(name)
        if gradient is not None and tensor_map is not None:
            gradient = tensor_map.first_replica(gradient)
            if dynamic_teacher.scale == 'teacher':
                gradient = gradient / tensor_map.divisor
        yield name, gradient, gradients[name]


def gradients_of(output: object, tensors: Mapping[str, torch.Tensor]) -> Dict[str, Optional[torch.Tensor]]:
    """Gradients of a loss of what a model returned, by name; None where a tensor has none, nothing if no tensor has."""
    loss = sum(tensor.float().square().mean() for tensor in outputs_of(output))
    if not tensors or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return {}
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)))


def _agree(actual: Optional[torch.Tensor], expected: Optional[torch.Tensor]) -> bool:
    """Equal, or apart by what rounding does to a deep model; a gradient that is not there is zero."""
    tensors: List[torch.Tensor] = [tensor for tensor in (actual, expected) if tensor is not None]
    if len(tensors) < 2:
        return not any(tensor.any() for tensor in tensors)
    if torch.equal(*tensors) or not tensors[1].is_floating_point():
        return torch.equal(*tensors)
    finite = tensors[1][tensors[1].isfinite()]  # a student may have a gradient that is NaN: so has the one inside
    size = finite.abs().amax().item() if finite.numel() else 0.0
    rounding = ROUNDING * torch.finfo(tensors[1].dtype).eps ** 0.5
    return torch.allclose(*tensors, rtol=0.0, atol=rounding * size, equal_nan=True)
