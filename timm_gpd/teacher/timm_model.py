"""What timm expects of every model, for the dynamic teacher: features and logits are the teacher's."""

import re
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn

from ..expansion import plan_expansion
from .functional import call_with_parameters, memory_format_of

__all__ = ['TimmModel']

_MODELS = ('wide', 'branches', 'student')  # the children of a dynamic teacher
# What follows from a plan.
_READINGS = ('plan', '_divisors', '_layout', '_branched', '_teacher_multipliers', '_shared', '_nested')


class TimmModel(nn.Module):
    """The part of :class:`DynamicTeacher` that follows timm's model contract.

    What the student's class lacks, the dynamic teacher lacks too.
    """

    wide: nn.Module
    branches: nn.Module
    student: nn.Module
    pretrained_cfg: Dict[str, Any]

    num_classes = property(lambda self: self.student.num_classes, doc='Number of classes, 0 without a classifier.')
    in_chans = property(lambda self: self.student.in_chans, doc='Channels of the images.')
    num_features = property(lambda self: self.wide.num_features, doc="Width of the teacher's features.")
    head_hidden_size = property(
        lambda self: self.wide.head_hidden_size, doc="Width of what the teacher's classifier receives."
    )
    feature_info = property(lambda self: self.wide.feature_info, doc="The teacher's stages, a dict for each.")
    default_cfg = property(lambda self: self.pretrained_cfg, doc='The former name of pretrained_cfg.')

    def _record_config(self) -> None:
        """Takes over the student's config, in which names of modules become those of the wide model."""
        config = getattr(self.student, 'pretrained_cfg', None)
        if config is not None:
            self.pretrained_cfg = {
                key: _prefixed(value) if key in ('classifier', 'first_conv') else value for key, value in config.items()
            }

    # -- features and logits of the teacher -------------------------------------------------------------------------

    def forward_features(self, x: torch.Tensor, **kwargs: Any) -> Any:
        """The teacher's features before pooling.

        Args:
            x: images, shape (B, in_chans, H, W).
            **kwargs: arguments of the student's ``forward_features``.

        Returns:
            The features, as the student's class lays them out, wider than the student's.

        Raises:
            AttributeError: if the student's class has no ``forward_features``.
        """
        return self._call('forward_features', x, kwargs)

    def forward_head(self, x: Any, **kwargs: Any) -> torch.Tensor:
        """The teacher's logits from its features.

        Args:
            x: what :meth:`forward_features` returned.
            **kwargs: arguments of the student's ``forward_head``.

        Returns:
            Logits, shape (B, num_classes), or with ``pre_logits`` what the classifier receives, shape (B, D).

        Raises:
            AttributeError: if the student's class has no ``forward_head``.
        """
        return self._call('forward_head', x, kwargs)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The teacher's features and those of its stages.

        Args:
            x: images, shape (B, in_chans, H, W).
            *args: arguments of the student's ``forward_intermediates``.
            **kwargs: the same.

        Returns:
            What the student's ``forward_intermediates`` returns: features and a list of those of stages, each of shape
            (B, C, H, W) unless asked for otherwise, or one of the two.

        Raises:
            AttributeError: if the student's class has no ``forward_intermediates``.
        """
        return self._call('forward_intermediates', x, kwargs, args)

    def _call(self, method: str, x: Any, kwargs: Mapping[str, Any], args: Tuple[Any, ...] = ()) -> Any:
        getattr(self.wide, method)  # whoever asks whether the model has it gets the class's own answer
        images = isinstance(x, torch.Tensor) and x.dim() == 4
        parameters = self.teacher_parameters(memory_format_of(x) if images else torch.contiguous_format)
        return call_with_parameters(
            _Method(self.wide, method, args, kwargs),
            {f'model.{name}': tensor for name, tensor in parameters.items()},
            x,
        )

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the student would keep the layers.

        Args:
            *args: those of the student's ``prune_intermediate_layers``; not used.
            **kwargs: the same.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            'a dynamic teacher cannot be pruned, as its student would keep the layers: prune the student and expand it'
        )

    # -- classifier -------------------------------------------------------------------------------------------------

    def get_classifier(self) -> Any:
        """The wide model's classifier, whose parameters are stored tensors.

        Returns:
            What the student's ``get_classifier()`` returns: a module, or several.

        Raises:
            AttributeError: if the student's class has no ``get_classifier``.
        """
        return self.wide.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Gives both models a new classifier, which they share. All other tensors and what they share stay.

        As with any timm model, an optimizer that was made before does not know the new classifier: make a new one. For
        everything else it goes on working, since the parameters are the same objects. The plan is a new one.

        Args:
            num_classes: number of classes; with 0 both models return pooled features, the teacher's ``ratio`` times as
                wide as the student's.
            global_pool: pooling type (default: stays).

        Raises:
            AttributeError: if the student's class has no ``reset_classifier``.
            UnsupportedModelError: if the student cannot be widened with its new classifier.
        """
        plain = self.extract_student()
        before = _tensors(plain)
        plain.reset_classifier(num_classes, *(() if global_pool is None else (global_pool,)))
        example = next(self.parameters())
        plain.to(example.device, example.dtype)
        after = _tensors(plain)
        plan = plan_expansion(plain, self.plan.ratio, None if num_classes else ())
        fresh = type(self)(plain, plan, noise=0.0, scale=self.scale, branches=self.branch_kinds)
        _keep_tensors(fresh, self, {name for name in after if after[name] is not before.get(name)})
        modes = {name: module.training for name, module in self.named_modules()}
        for name in _MODELS:  # tasks and taps hold the roots, which stay the same modules
            root, new = getattr(self, name), getattr(fresh, name)
            root.__dict__.clear()
            root.__dict__.update(new.__dict__)
        for name in _READINGS:
            setattr(self, name, getattr(fresh, name))
        for name, module in self.named_modules():
            module.training = modes.get(name, self.training)

    # -- what timm's optimizer factory asks, checkpoints ------------------------------------------------------------

    def no_weight_decay(self) -> Set[str]:
        """What the student's class exempts from weight decay.

        Returns:
            Names of parameters of this module; empty if the class exempts none.
        """
        exempt = self.wide.no_weight_decay() if hasattr(self.wide, 'no_weight_decay') else set()
        return {f'wide.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Union[Dict[str, Any], Callable[[str], Any]]:
        """The student's layer groups, for layer-wise learning rate decay.

        Args:
            coarse: larger groups, such as stages instead of blocks.

        Returns:
            What timm's ``group_parameters`` takes, for names of this module's parameters: patterns by group, or a
            function from a name to its group.

        Raises:
            AttributeError: if the student's class has no ``group_matcher``.
        """
        matcher = self.wide.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(re.sub(r'^(?:wide|branches)\.', '', name))
        return {group: _inside(pattern) for group, pattern in matcher.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, in both models.

        Args:
            enable: False keeps activations again.

        Raises:
            AttributeError: if the student's class has no ``set_grad_checkpointing``.
        """
        self.wide.set_grad_checkpointing(enable)
        self.student.set_grad_checkpointing(enable)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a dynamic teacher's state, or a plain student's, whose function the teacher then starts from.

        Args:
            state_dict: of a dynamic teacher, or of a student, such as ``state_dict`` in a checkpoint of a task.
            strict: whether all keys must match.
            assign: see ``nn.Module.load_state_dict``; for a dynamic teacher's state.

        Returns:
            Missing and unexpected keys.

        Raises:
            RuntimeError: if a tensor has another shape or, with ``strict``, keys do not match.
        """
        of_student = {*self._layout.names, *(name for name, _ in self.student.named_buffers())}
        prefixed = any(key.partition('.')[0] in _MODELS for key in state_dict)
        # A student may have a module of the same name.
        if not state_dict or (prefixed and not (of_student & state_dict.keys() - self.state_dict().keys())):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        return self.load_student(dict(state_dict), strict=strict)


class _Method(nn.Module):
    """A method of a model as the forward of a module, which runs on parameters that it is given."""

    def __init__(self, model: nn.Module, method: str, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.method, self.args, self.kwargs = model, method, args, kwargs

    def forward(self, x: Any) -> Any:
        return getattr(self.model, self.method)(x, *self.args, **self.kwargs)


def _keep_tensors(fresh: nn.Module, old: nn.Module, new_names: Set[str]) -> None:
    """Puts the tensors of one dynamic teacher into another, but those whose names in the student are new."""
    tensors = _tensors(old)
    for path, module in fresh.named_modules():
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                name = f'{path}.{key}'
                model, _, name_in_student = name.partition('.')
                kept = tensors.get(name)
                if (
                    kept is not None
                    and kept.shape == tensor.shape
                    and (model == 'branches' or name_in_student not in new_names)
                ):
                    slots[key] = kept


def _tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _prefixed(names: Any) -> Any:
    """Names of modules of the student as those of the wide model."""
    if isinstance(names, (tuple, list)):
        return type(names)(_prefixed(name) for name in names)
    return f'wide.{names}' if names else names


def _inside(pattern: Any) -> Any:
    """A pattern of a group matcher for the same names inside a dynamic teacher."""
    if isinstance(pattern, str):  # matched from the start of a name, every alternative of it
        return r'^(?:wide|branches)\.(?:' + re.sub(r'(^|[|(])\^', r'\1', pattern) + ')'
    return [(_inside(p[0]), *p[1:]) if isinstance(p, tuple) else _inside(p) for p in pattern]
