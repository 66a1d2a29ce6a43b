"""Rules: the documented example, and what a rule may say."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from exactness import expansion_errors
from timm_gpd import Rule, UnsupportedModelError, plan_expansion, register_rule
from timm_gpd.axes import AxisMap, Segment
from timm_gpd.expansion.functions import watched
from timm_gpd.expansion.functions.elementwise import is_elementwise
from timm_gpd.expansion.traced import mark_own

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'rules.md'


def test_documented_example(capsys):
    """Every code block of the document runs, in order; it asserts what it claims."""
    namespace = {'__name__': 'documented_example'}
    blocks = re.findall(r'^```python\n(.*?)^```', DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(DOCUMENT), 'exec'), namespace)
    assert "module 'mixer' of class documented_example.PartialAttention" in capsys.readouterr().out


def test_documented_functions():
    """The table lists what has a handler, and nothing else."""
    table = DOCUMENT.read_text().partition('| functions | a parameter |')[2].partition('\n\n')[0]
    documented = [name for row in table.splitlines()[2:] for name in re.findall(r'`(\w+)`', row.split('|')[1])]
    assert len(set(documented)) == len(documented)
    assert set(documented) == {function.__name__.strip('_') for function in watched()}


@pytest.mark.parametrize(
    'function',
    [
        torch.mul,
        torch.multiply,
        torch.Tensor.__mul__,
        torch.Tensor.mul_,
        torch.Tensor.__imul__,
        torch.Tensor.__rmul__,
        torch.sub,
        torch.subtract,
        torch.rsub,
        torch.Tensor.__rsub__,
        torch.div,
        torch.divide,
        torch.true_divide,
        torch.Tensor.__rtruediv__,
        torch.floor_divide,
        torch.pow,
        torch.float_power,
        torch.Tensor.__rpow__,
        torch.max,
        torch.maximum,
        torch.fmin,
        torch.hypot,
        torch.atan2,
        torch.eq,
        torch.gt,
        torch.xlogy,
        torch.Tensor.copy_,
    ],
)
def test_elementwise_functions_are_known_by_what_they_do(function):
    pair = torch.ones(8), torch.ones(3, 8)
    assert not is_elementwise(function, pair, {})  # no parameter
    mark_own(pair[0], 'weight')
    assert is_elementwise(function, pair, {})


@pytest.mark.parametrize(
    'function',
    [
        torch.matmul,
        torch.cdist,
        torch.dot,
        torch.outer,
        torch.dist,
        torch.kron,
        F.cosine_similarity,
        torch.Tensor.type_as,
        torch.Tensor.to,
        torch.Tensor.expand_as,
    ],
)
def test_other_functions_are_not_elementwise(function):
    pair = torch.ones(8), torch.ones(3, 8)
    mark_own(pair[0], 'weight')
    assert not is_elementwise(function, pair, {})


class Splitter(nn.Module):
    """Halves of uneven, stored sizes; the second is scaled by one stored number for each of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [6, 2]
        self.first, self.second = nn.Linear(6, 6), nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.split(self.sizes, dim=-1)
        return torch.cat([self.first(a), self.second(b) * self.gain.view(1, 1, self.sizes[1])], dim=-1)


class Student(nn.Module):
    pretrained_cfg = {'input_size': (3, 8, 8)}

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.stem, self.mixer, self.head = nn.Conv2d(3, 8, 2, stride=2), mixer, nn.Linear(8, 5)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize('ratio', (1, 2, 3, 4))
def test_subclasses_inherit_a_rule(ratio):
    class Child(Splitter):
        pass

    register_rule(Splitter, Rule(multiply=('sizes',), params={'gain': 0}))
    student = Student(Child())
    plan = plan_expansion(student, ratio)
    errors = expansion_errors(student, plan, torch.randn(4, 3, 8, 8))
    assert max(errors.values()) <= 1e-12, errors
    assert student.mixer.sizes == [6, 2]  # the student is never modified
    assert ratio == 1 or plan.attributes['mixer']['sizes'] == ([6, 2], [6 * ratio, 2 * ratio])


def test_a_rule_of_another_size_is_refused():
    class Wrong(Splitter):
        pass

    register_rule(Wrong, Rule(multiply=('sizes',), code=lambda rule: rule.axis('first.out', (4, rule.ratio, 1))))
    with pytest.raises(UnsupportedModelError, match='a rule describes 4 entries of an axis that has 6'):
        plan_expansion(Student(Wrong()))


@pytest.mark.parametrize('name', ('axis', 'layout'))
def test_an_axis_is_described_by_segments(name):
    """``layout`` is the former name, which rules of users may have."""

    class Described(Splitter):
        pass

    register_rule(
        Described,
        Rule(
            multiply=('sizes',),
            params={'gain': 0},
            code=lambda rule: getattr(rule, name)('first.out', (4, rule.ratio, 2), (2, rule.ratio, 1)),
        ),
    )
    plan = plan_expansion(Student(Described()), 3)
    segments = AxisMap((Segment(4, 3, 2), Segment(2, 3, 1)))
    assert dict(plan.tensors['mixer.first.weight'].axes) == {0: segments, 1: AxisMap.uniform(6, 3)}
    assert dict(plan.tensors['mixer.first.bias'].axes) == {0: segments}
