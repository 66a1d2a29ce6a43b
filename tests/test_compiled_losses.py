"""A step with a static teacher, compiled: two graphs, one of what is trained and one of the static teacher."""

import copy

import pytest
import timm
import torch
import torch._dynamo
import torch.nn as nn
from torch._dynamo.utils import counters

from timm_gpd import DistillationTask, GapPreservingTask, StaticTeacherConfig
from timm_gpd.distillers import DISTILLERS, Distillers

CLASSES = 5


class Small(nn.Module):
    """What a timm model offers, in four layers: a compiler takes time by the layer."""

    def __init__(self, width: int = 4, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)
        self.conv, self.norm2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(2 * width, num_classes)
        self.feature_info = [dict(num_chs=width, reduction=2), dict(num_chs=2 * width, reduction=4)]
        self.pretrained_cfg = dict(input_size=(3, 16, 16))

    def get_classifier(self):
        return self.fc

    def forward_intermediates(self, x, indices, output_fmt):
        first = self.norm1(self.stem(x)).relu()
        second = self.norm2(self.conv(first)).relu()
        return second, [(first, second)[index] for index in indices]

    def forward_features(self, x):
        return self.forward_intermediates(x, (), 'NCHW')[0]

    def forward_head(self, x):
        return self.fc(self.drop(x.mean((2, 3))))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def make_task(task_class, losses, static_teacher=None):
    student = Small()
    if losses == 'token':
        student = timm.create_model(
            'deit_tiny_distilled_patch16_224', num_classes=CLASSES, img_size=16, embed_dim=12, depth=1, num_heads=1
        )
    task = task_class(student, static_teacher or Small(6), distill_type=losses, verbose=False)
    return task.double().train()


def batch(size):
    return torch.randn(size, 3, 16, 16, dtype=torch.float64), torch.arange(size) % CLASSES


def compile_and_count(task):
    """Compiles a task; graphs are appended to the list that is returned, as they are made."""
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    counters.clear()
    task.compile(backend=count)
    return graphs


def step(task, x, target):
    """What a step returns, and the gradients that it gives."""
    torch.manual_seed(1)  # there is dropout
    task.zero_grad()
    result = task(x, target)
    result['loss'].backward()
    return result, {name: parameter.grad for name, parameter in task.get_trainable_module().named_parameters()}


def several():
    """Static teachers, of which one sees larger images and knows more classes."""
    class_map = [[0, 5], 1, [2, 6], 3, 4]
    return [Small(6), StaticTeacherConfig(Small(5, num_classes=7), img_size=24, class_map=class_map)]


ALL = ','.join(name for name in DISTILLERS if name not in ('logit', 'token'))  # logit is another name of kd


@pytest.mark.usefixtures('may_change_settings')
@pytest.mark.parametrize(
    'task_class, losses, static_teachers, sizes',
    [
        (DistillationTask, ALL, None, (4, 3, 2)),
        (DistillationTask, 'token', None, (4, 4)),
        (DistillationTask, 'kd,nd@2', several, (4, 4)),
        (GapPreservingTask, 'dkd,reviewkd,nd', None, (4, 3, 2)),
    ],
    ids=['all losses', 'token', 'several teachers', 'joint'],
)
def test_one_graph_of_what_is_trained_and_one_of_the_static_teacher(task_class, losses, static_teachers, sizes):
    """Values and gradients are those of the plain step, and a second batch size is the last that is compiled for."""
    task = make_task(task_class, losses, static_teachers and static_teachers())
    compiled = copy.deepcopy(task)
    graphs = compile_and_count(compiled)
    counts = []
    for size in sizes:
        images = batch(size)
        before = len(graphs)
        (result, gradients), (expected, expected_gradients) = step(compiled, *images), step(task, *images)
        counts.append(len(graphs) - before)
        assert set(result) == set(expected)
        for actual, wanted in ((result, expected), (gradients, expected_gradients)):
            for name, tensor in wanted.items():
                torch.testing.assert_close(actual[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
        compiled.eval()
        compiled.get_eval_model()(images[0])
        compiled.train()
    assert counts == {(4, 3, 2): [2, 2, 0], (4, 4): [2, 0]}[sizes], dict(counters['graph_break'])


@pytest.mark.usefixtures('may_change_settings')
def test_a_break_is_found(monkeypatch):
    """A fault that is planted into every loss makes more graphs than two."""
    forward = Distillers.forward

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    monkeypatch.setattr(Distillers, 'forward', broken)
    task = make_task(DistillationTask, 'kd')
    graphs = compile_and_count(task)
    step(task, *batch(4))
    assert len(graphs) > 2
