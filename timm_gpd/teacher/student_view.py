"""The student inside a dynamic teacher, as a model of its own."""

from typing import Any, Dict

import torch
import torch.nn as nn

__all__ = ['StudentView', 'View']


class View(nn.Module):
    """What runs a model inside a dynamic teacher and owns nothing. Its mode is that model's: to set one sets both.

    Args:
        dynamic_teacher: a :class:`DynamicTeacher`.
        runs: name of the model in it, ``'student'`` or ``'wide'``.
    """

    dynamic_teacher: Any

    def __init__(self, dynamic_teacher: nn.Module, runs: str) -> None:
        super().__init__()
        object.__setattr__(self, 'dynamic_teacher', dynamic_teacher)  # a reference, not a submodule
        self.runs = runs

    @property
    def training(self) -> bool:
        """Whether the model that it runs trains."""
        return getattr(self.dynamic_teacher, self.runs).training

    @training.setter
    def training(self, mode: bool) -> None:
        if hasattr(self, 'runs'):  # not yet where nn.Module begins with a mode
            getattr(self.dynamic_teacher, self.runs).train(mode)


class StudentView(View):
    """The student inside a dynamic teacher, as a model of its own that is always up to date.

    ``forward`` gives the student's logits, ``state_dict`` a plain student's, and ``load_state_dict`` expands one into
    the dynamic teacher. It owns nothing.

    Args:
        dynamic_teacher: a :class:`DynamicTeacher`; the mode of its student is the view's.
    """

    def __init__(self, dynamic_teacher: nn.Module) -> None:
        super().__init__(dynamic_teacher, 'student')
        # As a part of a task its state comes with the dynamic teacher's.
        self.register_load_state_dict_pre_hook(_take_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the student.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            Its logits, shape (B, num_classes).
        """
        return self.dynamic_teacher.forward_student(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """A plain student's ``state_dict``.

        Args:
            *args: of ``nn.Module.state_dict``.
            **kwargs: the same.

        Returns:
            Copies of the student's tensors by name.
        """
        return self.dynamic_teacher.extract_student().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Expands a plain student's ``state_dict`` into the dynamic teacher.

        Args:
            state_dict: a plain student's.
            strict: whether all keys must match.
            assign: ignored: tensors are copied.

        Returns:
            Missing and unexpected keys, as every ``load_state_dict``.
        """
        return self.dynamic_teacher.load_student(state_dict, strict=strict)


def _take_out(module: nn.Module, state_dict: Dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
