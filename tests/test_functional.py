"""Running a module on tensors that it does not own: right wherever a module keeps its parts, and it stays as it was."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.func import functional_call

from timm_gpd.teacher.functional import call_with_parameters


class Hoarder(nn.Module):
    """Keeps modules and results in every place that is no proper one."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.grad_checkpointing = checkpointing
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.first  # one module under two names
        self.listed, self.named = [self.first], {'second': (self.second, 1)}
        self.method = self._apply_second
        self.norm = nn.BatchNorm1d(3)
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.cache, self.last, self.calls = {}, None, 0

    def _apply_second(self, x):
        return self.named['second'][0](x)

    def forward(self, x):
        x = self.listed[0](x)
        if 'bias' not in self.cache:
            self.cache['bias'] = self.first.bias * 2
        self.last = x + self.cache['bias']
        self.calls += 1
        x = self.norm(self.method(torch.tanh(self.last)))
        return self.again(self.recurrent(x[None])[0][0])


@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_twin_computes_what_the_model_with_those_parameters_would(checkpointing):
    model = Hoarder(checkpointing).double()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters(remove_duplicate=False)}
    parameters.update({name: parameters[name.replace('again', 'first')] for name in parameters if 'again' in name})
    x = torch.randn(4, 3, dtype=torch.float64)
    state = copy.deepcopy(model.__dict__)
    outputs = [call_with_parameters(model, parameters, x), call_with_parameters(model, parameters, x)]
    assert model.cache == {} and model.last is None and model.calls == 0 and model.__dict__.keys() == state.keys()
    assert model.norm.num_batches_tracked == 2, 'buffers are shared'
    expected = [other(x), other(x)]
    for output, reference in zip(outputs, expected):
        torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad(
        sum(output.sum() for output in outputs), list({id(p): p for p in parameters.values()}.values())
    )
    for gradient, reference in zip(
        actual, torch.autograd.grad(sum(o.sum() for o in expected), list(other.parameters()))
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)
    copy.deepcopy(model)  # holds nothing computed


def test_a_plain_model_is_what_torch_runs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    parameters = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(call_with_parameters(model, parameters, x), functional_call(model, parameters, (x,)))
