"""Online modules: what a frozen static teacher gains so that it can adapt to its student.

After online knowledge distillation (arXiv 2409.12512), in which small modules inside a frozen teacher train along with
the student. That paper is about language models; here the modules are bottlenecks on the outputs of a timm model's
stages, and a second head beside its classifier.
"""

import contextlib
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn

from ..distillers import Tap, evaluation_mode, stage_modules
from ..errors import InputError
from ..losses import kd_loss

__all__ = ['OnlineModules', 'online_terms']

REDUCTION, MIN_WIDTH = 8, 8  # a bottleneck has an eighth of a stage's channels, and at least eight


class Adapter(nn.Module):
    """A bottleneck along one axis, whose output is added: zero at the start.

    Args:
        channels: width of what it is added to.
        axis: which axis that is, of a tensor (B, C, H, W), (B, H, W, C) or (B, N, C).
    """

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        width = max(channels // REDUCTION, MIN_WIDTH)
        self.bottleneck = nn.Sequential(nn.Linear(channels, width), nn.GELU(), _zero(nn.Linear(width, channels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + _along(self.bottleneck, x, self.axis)


class Head(nn.Module):
    """A second linear classifier, whose logits are added to those of the first: zero at the start.

    Args:
        in_features: width of what the classifier receives.
        num_classes: its logits.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = _zero(nn.Linear(in_features, num_classes))

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits + _along(self.linear, x, 1)


class OnlineModules(nn.Module):
    """Adapters on a teacher's stages and a head beside its classifier. They are hooked in for the time of a call.

    The teacher is as it was outside of :meth:`inserted`, and owns none of them. They start at zero, so that it starts
    as the same function, bit for bit.

    Args:
        tap: the teacher's.
        x: example images that the teacher takes, whose features tell widths.

    Raises:
        InputError: if the teacher has no classifier that receives one vector per image.
    """

    def __init__(self, tap: Tap, x: torch.Tensor) -> None:
        super().__init__()
        seen: Dict[str, List[Tuple[Any, Any]]] = {}
        places, classifiers = stage_modules(tap.model), tap.classifiers()
        with _hooked(
            [(tap.model.get_submodule(name), partial(_note, seen, name)) for name in places]
            + [(module, partial(_note, seen, f'head {index}')) for index, module in enumerate(classifiers)]
        ):
            with torch.no_grad(), evaluation_mode(tap.model):
                tap(x)
        axes = {
            name: _channel_axis([result for _, result in seen.get(name, ())], channels, tap.model)
            for name, channels in places.items()
        }
        self.names = [name for name, axis in axes.items() if axis is not None]
        self.adapters = nn.ModuleList([Adapter(places[name], axes[name]) for name in self.names])
        self.heads = nn.ModuleList()
        for index, _ in enumerate(classifiers):
            ((received, *_), logits), *more = seen.get(f'head {index}', [((None,), None)])
            if more or not _is_vector(received) or not _is_vector(logits):
                raise InputError(
                    f'{type(tap.model).__name__} has no classifier of one vector per image, beside which online '
                    'modules have a head: choose another static teacher'
                )
            self.heads.append(Head(received.shape[1], logits.shape[1]))
        if not self.heads:
            raise InputError(
                f'{type(tap.model).__name__} has no classifier, beside which online modules have a head: choose '
                'another static teacher'
            )
        self._leave_out_idle(tap, x)

    def _leave_out_idle(self, tap: Tap, x: torch.Tensor) -> None:
        """Drops adapters on what does not lead to the logits."""
        self.to(x)
        with torch.enable_grad(), evaluation_mode(tap.model), self.inserted(tap):
            logits = tap(x).logits
        ends = [adapter.bottleneck[-1].bias for adapter in self.adapters]
        gradients = torch.autograd.grad(logits.sum(), ends, allow_unused=True) if ends else ()
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        self.names = [self.names[index] for index in used]
        self.adapters = nn.ModuleList([self.adapters[index] for index in used])

    @contextlib.contextmanager
    def inserted(self, tap: Tap) -> Iterator[None]:
        """Lets the teacher run with them.

        Args:
            tap: the teacher's, as at the start.

        Yields:
            Nothing.
        """
        adapters = [
            (tap.model.get_submodule(name), lambda _, args, result, adapter=adapter: adapter(result))
            for name, adapter in zip(self.names, self.adapters)
        ]
        heads = [
            (module, lambda _, args, result, head=head: head(args[0], result))
            for module, head in zip(tap.classifiers(), self.heads)
        ]
        with _hooked([*adapters, *heads]):
            yield

    def extra_repr(self) -> str:
        return f'adapters on {", ".join(self.names) or "nothing"}'


def online_terms(
    logits: torch.Tensor,
    student_logits: torch.Tensor,
    target: torch.Tensor,
    criterion: Callable[..., torch.Tensor],
) -> Dict[str, torch.Tensor]:
    """What the online modules of a teacher are trained on: the task loss, and to be near the student.

    The divergence is of probabilities that are not softened, as in the paper. Gradients do not flow into the student,
    nor do those of the student's losses into the modules: the two models see each other's logits as given.

    Args:
        logits: the teacher's, shape (B, num_classes), of the student's classes.
        student_logits: shape (B, num_classes).
        target: see the criterion.
        criterion: the task loss.

    Returns:
        ``online_task_loss`` and ``online_kd_loss``, scalars.
    """
    return {
        'online_task_loss': criterion(logits, target),
        'online_kd_loss': kd_loss(logits, student_logits, temperature=1.0),
    }


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _along(module: nn.Module, x: torch.Tensor, axis: int) -> torch.Tensor:
    """A function of vectors along an axis, computed where and as its parameters are, and given back as ``x`` is."""
    like = next(module.parameters())
    return module(x.movedim(axis, -1).to(like.device, like.dtype)).movedim(-1, axis).to(x.device, x.dtype)


@contextlib.contextmanager
def _hooked(hooks: List[Tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: Dict[str, List[Tuple[Any, Any]]], name: str, _: nn.Module, args: Any, result: Any) -> None:
    seen.setdefault(name, []).append((args, result))


def _is_vector(x: Any) -> bool:
    """Whether it is one vector for each image, (B, C) or (B, C, 1, 1)."""
    return isinstance(x, torch.Tensor) and x.dim() >= 2 and x.shape[:2].numel() == x.numel()


def _channel_axis(results: List[Any], channels: int, model: nn.Module) -> Optional[int]:
    """The axis of a stage's output that has its channels; None where it is not one tensor, or no axis has them."""
    if len(results) != 1 or not isinstance(results[0], torch.Tensor) or results[0].dim() not in (3, 4):
        return None
    x = results[0]
    is_last = x.dim() == 3 or getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
    axes = [axis for axis in ((-1, 1) if is_last else (1, -1)) if x.shape[axis] == channels]
    return axes[0] if axes else None
