"""A backward pass that runs as soon as its loss is there, so that its activations are gone when the next model runs.

A sum of losses may be differentiated one by one where no loss needs the graph of another: the dynamic teacher's does
not need the student, and the student's takes the teacher's logits as constants. What is left of the first loss is its
gradients, which join the backward pass of the sum. Memory then is that of one model's activations at a time.
"""

from typing import Any, Dict, Iterable, List, Mapping

import torch

from ..private_torch import can_trace_backward, has_active_transforms, has_forward_mode, multiply_each

__all__ = ['EarlyBackward', 'reaches_others', 'refuse_gradients']


class EarlyBackward:
    """Differentiates a first loss before a second one is computed.

    In three steps: it is made from the tensors that the first loss will be computed from, :meth:`run` gets that loss,
    and after the forward pass of the second :meth:`join` gives a term to add to it::

        early = EarlyBackward(tensors)
        result = early.run({'loss': first_loss(tensors), ...})
        loss = second_loss() + result['loss'] + early.join()

    Where it is not possible :meth:`run` does nothing, and gradients come with the backward pass of the sum, as usual:
    in float16 autocast, as the scale of the gradients is not known before; within ``torch.func`` transforms and in
    forward mode, of which a detached loss would lose its part; where no gradients are asked for; where the loss turns
    out to depend on others that want theirs, such as a parameter that its function closes over; and compiled without
    :func:`timm_gpd.private_torch.trace_backward`.

    Args:
        tensors: all that the loss may depend on and that wants its gradient; a tensor may come twice.
        are_all: whether these are all. Where they may not be, it is found out by the graph, which a compiler cannot do.
            Before it compiles, :func:`reaches_others` can.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], are_all: bool = True) -> None:
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        self.is_early = torch.is_grad_enabled() and len(wanted) > 0 and _is_possible(wanted[0].device)
        self.is_early = self.is_early and (are_all or not torch.compiler.is_compiling())
        self._stand_ins: List[torch.Tensor] = []
        self._sources: List[Any] = []
        self._gradients: List[torch.Tensor] = []
        if self.is_early:
            wanted = list({id(tensor): tensor for tensor in wanted}.values())  # tied tensors have several names
            self._stand_ins = [_StandIn.apply(tensor) for tensor in wanted]
            self._sources = [_edge(tensor) for tensor in wanted]

    def run(self, result: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Runs the backward pass of a loss.

        Tensors that nothing but the loss's graph holds are freed on the way.

        Args:
            result: tensors by name, of which ``'loss'`` is a scalar.

        Returns:
            The same, detached.
        """
        loss = result['loss']
        if self.is_early and not torch.compiler.is_compiling() and _leads_elsewhere(loss, self._sources):
            self.is_early, self._stand_ins, self._sources = False, [], []
        result = {name: tensor.detach() for name, tensor in result.items()}
        self._loss = result['loss'] if self.is_early else loss  # the loss itself would keep its graph
        if self.is_early:
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, self._sources, allow_unused=True)
            used = [i for i, gradient in enumerate(gradients) if gradient is not None]
            self._gradients, self._stand_ins = [gradients[i] for i in used], [self._stand_ins[i] for i in used]
            self._sources = []
        return result

    def leave_out(
        self,
        result: Mapping[str, torch.Tensor],
        idle: Iterable[torch.Tensor] = (),
    ) -> Dict[str, torch.Tensor]:
        """Takes the place of :meth:`run` where the loss shall have no part in the sum: its graph is let go unused.

        Args:
            result: see :meth:`run`.
            idle: parameters that perhaps nothing else computes with. :meth:`join` gives them gradients of 0: what sums
                up gradients over processes waits for those of all parameters.

        Returns:
            The same, detached, with a loss of 0.
        """
        idle = [parameter for parameter in idle if parameter.requires_grad]
        result = {name: tensor.detach() for name, tensor in result.items()}
        result['loss'] = self._loss = torch.zeros_like(result['loss'])
        self.is_early, self._sources = True, []
        self._gradients = [torch.zeros_like(parameter) for parameter in idle]
        self._stand_ins = [_StandIn.apply(parameter) for parameter in idle]
        return result

    def join(self) -> torch.Tensor:
        """A scalar 0 whose gradients are those of the loss, to add to another loss for one backward pass.

        Called after the other loss's forward pass, it makes these gradients the first of the backward pass, and what
        they add up with is complete as early as it can be. It is not part of the loss yet: a compiler makes one tensor
        of two equal results, and a loss may equal one of its terms, which has no gradient.
        """
        if not self.is_early:
            return self._loss - self._loss.detach()
        gradients, self._gradients = self._gradients, []
        return _KnownGradients.apply(self._loss, gradients, *self._stand_ins)


def refuse_gradients(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor to read: a backward pass that reaches it raises a RuntimeError, where a detached one is passed over.

    Within ``torch.func`` transforms it is detached, as these let no tensor ask for a gradient.
    """
    if not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and has_active_transforms()):
        return tensor.detach()
    return _Refusing.apply(tensor.detach().requires_grad_())


def reaches_others(loss: torch.Tensor, tensors: Iterable[torch.Tensor]) -> bool:
    """Looks for what else a loss depends on.

    Args:
        loss: any tensor of a graph.
        tensors: what it may depend on; those that want no gradient are passed over.

    Returns:
        Whether there are tensors besides these that would get a gradient from it.
    """
    return _leads_elsewhere(loss, [_edge(tensor) for tensor in tensors if tensor.requires_grad])


def _is_possible(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        if not can_trace_backward():
            return False
    elif has_active_transforms() or has_forward_mode():
        return False
    return not (torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16)


def _leads_elsewhere(loss: torch.Tensor, sources: Iterable[Any]) -> bool:
    """Whether a backward pass would end in leaves besides those from which it is to be given."""
    seen = {source.node for source in sources}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):  # where gradients of a leaf are added up
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _edge(tensor: torch.Tensor) -> Any:
    """A tensor's place in the graph, which keeps no memory; compiled, the tensor: the compiler knows when to free."""
    return tensor if torch.compiler.is_compiling() else torch.autograd.graph.get_gradient_edge(tensor)


class _StandIn(torch.autograd.Function):
    """A tensor's shape and history, without its memory."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor):
        return tensor.new_empty(()).expand_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad


class _KnownGradients(torch.autograd.Function):
    """A scalar 0 whose gradients are there already."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: List[torch.Tensor], *sources: torch.Tensor):
        ctx.gradients = gradients
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if not torch.compiler.is_compiling():
            if gradients is None:
                raise RuntimeError(
                    "a task's loss can be differentiated once, as the dynamic teacher's backward pass has run and kept "
                    'no graph: call backward() once for every forward pass'
                )
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "a task's loss has no second derivatives, as the dynamic teacher's backward pass has run and kept "
                    'no graph: leave out create_graph=True, or differentiate a loss of DynamicTeacher.joint()'
                )
        # A pass over all gradients, and on a CPU one worth sparing, as the loss's is 1 where nothing is accumulated.
        if torch.compiler.is_compiling() or grad.device.type != 'cpu' or grad.item() != 1:
            gradients = multiply_each(gradients, grad)
        return None, None, *gradients


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise RuntimeError(
            "a loss was put on the dynamic teacher's output, which has no gradient any more, as the dynamic teacher's "
            'backward pass has run: make it part of the criterion, or use DynamicTeacher.joint(); detach() to read only'
        )
