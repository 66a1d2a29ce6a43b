"""Logits, stages and embedding of a timm model out of one forward pass."""

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import InputError

__all__ = [
    'ModelOutput',
    'Tap',
    'evaluation_mode',
    'example_output',
    'model_name',
    'stage_indices',
    'stage_modules',
]

MAX_STAGES = 4
# Where an isotropic model's stages end, as shares of its depth: blocks 2, 4, 10 and 12 of 12. These are the proportions
# of the usual pyramids (2, 2, 6 and 2 blocks), and the choice of OFA-KD for its ViTs.
ISOTROPIC_STAGES = (1 / 6, 1 / 3, 5 / 6, 1)


class ModelOutput(NamedTuple):
    """What a model computed for a batch of B images.

    Attributes:
        logits: shape (B, num_classes).
        stages: feature maps from shallow to deep, each of shape (B, C, H, W); empty if they were not asked for.
        embedding: the classifier's input, shape (B, D); None if it was not asked for.
        token: logits of the distillation token, shape (B, num_classes), apart from which ``logits`` are then; None
            if they were not asked for, and in evaluation mode, in which ``logits`` are the mean of both.
        each: of several static teachers, what each of them computed; ``logits`` are then of their mean probabilities.
        views: logits by view, each of shape (B, num_classes), where the batch was shown in several; all else is of the
            perturbed one then. None where it was not.
    """

    logits: torch.Tensor
    stages: Tuple[torch.Tensor, ...] = ()
    embedding: Optional[torch.Tensor] = None
    token: Optional[torch.Tensor] = None
    each: Tuple['ModelOutput', ...] = ()
    views: Optional[Dict[str, torch.Tensor]] = None

    def detach(self) -> 'ModelOutput':
        """Cuts the output off from the graph that it was computed in.

        Returns:
            The same tensors without their history.
        """
        return self.apply(torch.Tensor.detach)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> 'ModelOutput':
        """Makes another output of every tensor.

        Args:
            function: what to make of a tensor.

        Returns:
            The output of these.
        """
        return ModelOutput(
            function(self.logits),
            tuple(map(function, self.stages)),
            None if self.embedding is None else function(self.embedding),
            None if self.token is None else function(self.token),
            tuple(output.apply(function) for output in self.each),
            None if self.views is None else {view: function(logits) for view, logits in self.views.items()},
        )


class Tap(nn.Module):
    """Runs a timm model once for its logits and for what losses need besides.

    Stages come from ``forward_intermediates``, the embedding is what the classifier receives in the same pass. The
    logits are those of ``model(x)``, which :meth:`verify` checks. It adds no parameter, and asked for nothing it is the
    model itself.

    Args:
        model: timm model.
        needs: of ``'stages'``, ``'embedding'`` and ``'token'``, those that are asked for, each with the names of the
            losses that need it.

    Attributes:
        views: the views of a batch that images hold, one behind the other; empty where there is but the batch itself.

    Raises:
        ValueError: if the model does not offer what is needed.
    """

    def __init__(self, model: nn.Module, needs: Mapping[str, str]) -> None:
        super().__init__()
        self.model = model
        self.views: Tuple[str, ...] = ()
        self.needs = dict(needs)
        if 'token' in needs:
            self._require('set_distilled_training', needs['token'])
        features = [losses for need, losses in needs.items() if need != 'token']
        self.needs_features = bool(features)
        if not features:
            return
        self._require('forward_features', ', '.join(features))
        self._require('forward_head', ', '.join(features))
        if 'stages' in needs:
            self._require('forward_intermediates', needs['stages'])
            self._require('feature_info', needs['stages'])
            self.indices = stage_indices(model)
        if 'embedding' in needs:
            self._require('get_classifier', needs['embedding'])
            self.classifier_places = self._classifier_places()
            if not self.classifier_places:
                self._fail('no classifier to take an embedding from', needs['embedding'])

    def forward(self, x: torch.Tensor) -> ModelOutput:
        """Runs the model, once for every view: batch norm sees each by itself.

        Args:
            x: images, shape (B, in_chans, H, W), or of several views (B * views, in_chans, H, W).

        Returns:
            Logits, and what was asked for; of the perturbed images where there are views.

        Raises:
            ValueError: see :meth:`run`.
        """
        if not self.views:
            return self.run(x)
        outputs = dict(zip(self.views, [self.run(images) for images in x.chunk(len(self.views))]))
        return outputs['perturbed']._replace(views={view: output.logits for view, output in outputs.items()})

    def run(self, x: torch.Tensor) -> ModelOutput:
        """Runs the model once, whatever the views.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            Logits, and what was asked for.

        Raises:
            ValueError: if an embedding was asked for and the classifier does not receive one vector per image.
        """
        if not self.needs_features:
            return self.read(self.model(x))
        stages: List[torch.Tensor] = []
        if 'stages' in self.needs:
            features, stages = self.model.forward_intermediates(x, indices=self.indices, output_fmt='NCHW')
        else:
            features = self.model.forward_features(x)
        if 'embedding' not in self.needs:
            return self.read(self.model.forward_head(features), tuple(stages))
        with self._classifier_inputs() as inputs:
            logits = self.model.forward_head(features)
        shapes = [x.shape for x in inputs]  # compared and not hashed, which would fix a compiler's batch size
        if not shapes or any(shape != shapes[0] for shape in shapes) or any(size != 1 for size in shapes[0][2:]):
            self._fail('no single embedding', self.needs['embedding'])
        embeddings = [x.flatten(1) for x in inputs]
        return self.read(
            logits, tuple(stages), torch.stack(embeddings).mean(0) if len(embeddings) > 1 else embeddings[0]
        )

    def read(
        self,
        result: Any,
        stages: Tuple[torch.Tensor, ...] = (),
        embedding: Optional[torch.Tensor] = None,
    ) -> ModelOutput:
        """What the model has returned, as an output.

        Args:
            result: logits, or with a distillation token in training mode those of the class and those of the token.
            stages: see :class:`ModelOutput`.
            embedding: the same.

        Returns:
            The output.
        """
        if 'token' in self.needs and isinstance(result, (tuple, list)) and len(result) == 2:
            return ModelOutput(result[0], stages, embedding, result[1])
        return ModelOutput(result, stages, embedding)

    def separate_token(self) -> None:
        """Lets the model give the logits of its distillation token apart while it trains, if they are asked for."""
        if 'token' in self.needs:
            self.model.set_distilled_training(True)

    @torch.no_grad()
    def verify(self, x: torch.Tensor) -> ModelOutput:
        """Checks that tapping the model does not change it.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            What it made of them, in evaluation mode.

        Raises:
            ValueError: if the logits are not those of ``model(x)``.
        """
        with evaluation_mode(self.model):
            expected, output = self.model(x), self(x)
        if not torch.allclose(output.logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()):
            self._fail('features that lead to other logits than its forward does', ', '.join(self.needs.values()))
        return output

    def classifiers(self) -> List[nn.Module]:
        """The classifier, or with a distillation token the two whose logits are averaged.

        Returns:
            Modules that receive embeddings; none where the model names none.
        """
        return [getattr(self.model.get_submodule(owner), name) for owner, name in self._classifier_places()]

    def _classifier_places(self) -> List[Tuple[str, str]]:
        """Where they are: names of their owners, and theirs in them."""
        classifier = self.model.get_classifier() if hasattr(self.model, 'get_classifier') else None
        modules = classifier if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]
        # of some models it is the whole head, pooling included
        wanted = [getattr(module, 'fc', module) for module in modules if isinstance(module, nn.Module)]
        places = [
            name.rpartition('.')
            for name, module in self.model.named_modules(remove_duplicate=False)
            if name and any(module is each for each in wanted)
        ]
        return [(owner, name) for owner, _, name in places]

    @contextlib.contextmanager
    def _classifier_inputs(self) -> Iterator[List[torch.Tensor]]:
        """Within it classifiers write down what they receive.

        ``forward_head(pre_logits=True)`` would be a second pass through the head, with another dropout mask and another
        update of its BatchNorm statistics, and a compiler follows no hook that is registered on the way.
        """
        inputs: List[torch.Tensor] = []
        owners = [(self.model.get_submodule(path), name) for path, name in self.classifier_places]
        classifiers = [getattr(owner, name) for owner, name in owners]
        try:
            for (owner, name), classifier in zip(owners, classifiers):
                setattr(owner, name, _Recorder(classifier, inputs))
            yield inputs
        finally:
            for (owner, name), classifier in zip(owners, classifiers):
                setattr(owner, name, classifier)

    def _require(self, attribute: str, losses: str) -> None:
        if not hasattr(self.model, attribute):
            self._fail(f'no {attribute}', losses)

    def _fail(self, what: str, losses: str) -> None:
        raise InputError(
            f'{model_name(self.model)} has {what}, which {losses} would need: choose another model or another loss'
        )


class _Recorder(nn.Module):
    """A module in whose place it stands, with a list of what that receives."""

    def __init__(self, module: nn.Module, inputs: List[torch.Tensor]) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return self.module(x)


@torch.no_grad()
def example_output(
    module: nn.Module,
    example_input: torch.Tensor,
    run: Optional[Callable[[torch.Tensor], Any]] = None,
) -> Any:
    """A model's output in evaluation mode, from which distillers take their shapes. Leaves the model as it was.

    Args:
        module: the tap, or the module that ``run`` runs.
        example_input: images, shape (B, in_chans, H, W).
        run: how to run it, if it is not called directly.

    Returns:
        What the module or ``run`` returns, without history.
    """
    with evaluation_mode(module):
        return (run or module)(example_input)


def stage_indices(model: nn.Module) -> List[int]:
    """Which of a model's features to take as its stages, from shallow to deep, at most four.

    The last one of each resolution, or of a model with a single resolution those at fixed shares of its depth.
    """
    reductions = [info['reduction'] for info in _feature_dicts(model)]
    last = {reduction: index for index, reduction in enumerate(reductions)}
    if len(last) > 1:
        return sorted(last.values())[-MAX_STAGES:]
    return sorted({max(round(len(reductions) * share) - 1, 0) for share in ISOTROPIC_STAGES})


def stage_modules(model: nn.Module) -> Dict[str, int]:
    """The modules whose outputs are a model's stages, from shallow to deep.

    Args:
        model: timm model.

    Returns:
        Channels by the module's name. Stages whose module timm does not name, or calls otherwise, are left out.
    """
    if not hasattr(model, 'feature_info'):
        return {}
    infos, modules = _feature_dicts(model), dict(model.named_modules())
    stages = [infos[index] for index in stage_indices(model)]
    return {info['module']: info['num_chs'] for info in stages if info.get('module') in modules}


def model_name(model: nn.Module) -> str:
    """Architecture as timm calls it, or the class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def _feature_dicts(model: nn.Module) -> List[dict]:
    info = model.feature_info
    return info.info if hasattr(info, 'info') else info


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each module is in the mode that it was in.

    Args:
        module: it and all modules in it.

    Yields:
        Nothing.
    """
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
