"""The public API, used as its hints say: mypy reads this file, and it runs.

Errors of the API's hints show here: a call that has none, a result that is of another type.
"""

import importlib
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn

import timm_gpd
from conftest import TINY_RESNET
from timm_gpd import (
    DistillationTask,
    DynamicTeacher,
    ExpansionPlan,
    GapPreservingTask,
    Rule,
    StaticTeacherConfig,
    UnsupportedModelError,
    expand,
    hand_over,
    plan_expansion,
    register_rule,
)
from timm_gpd.losses import GPD_LOSSES, dkd_loss, kd_loss, needs_target, soft_target_cross_entropy
from timm_gpd.rules import find_rule

FACES = {
    'timm_gpd': [
        'DistillationTask',
        'DynamicTeacher',
        'ExpansionPlan',
        'GapPreservingTask',
        'Rule',
        'StaticTeacherConfig',
        'UnsupportedModelError',
        'expand',
        'hand_over',
        'plan_expansion',
        'rank_students',
        'register_rule',
    ],
    'timm_gpd.rules': ['Rule', 'find_rule', 'register_rule'],
    'timm_gpd.losses': [
        'GPD_LOSSES',
        'at_loss',
        'check_finite',
        'dist_loss',
        'dkd_loss',
        'hcl_loss',
        'kd_loss',
        'nd_loss',
        'ofa_loss',
        'rkd_loss',
        'soft_target_cross_entropy',
        'target_classes',
    ],
    'timm_gpd.distillers': [
        'DISTILLERS',
        'Distiller',
        'Distillers',
        'ModelOutput',
        'Tap',
        'distill_settings',
        'example_output',
        'tap_learner',
        'tap_teacher',
    ],
    'timm_gpd.task': [
        'Attack',
        'DistillationTask',
        'EmaTeacherConfig',
        'GapPreservingTask',
        'StaticTeacherConfig',
        'create_attack',
        'hand_over',
        'setup_adversary',
    ],
    'timm_gpd.rank': ['RankedStudent', 'Similarity', 'compare_networks', 'rank_students'],
    'timm_gpd.hub': ['convert', 'main', 'pull', 'push'],
    'timm_gpd.coverage': ['main'],
}


@pytest.mark.parametrize('face, names', FACES.items(), ids=list(FACES))
def test_faces_keep_their_names(face: str, names: List[str]) -> None:
    module = importlib.import_module(face)
    assert [name for name in names if not hasattr(module, name)] == []
    assert [name for name in getattr(module, '__all__', names) if not hasattr(module, name)] == []


def make_student() -> nn.Module:
    student = timm.create_model('test_resnet', **TINY_RESNET).eval()
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    assert isinstance(student, nn.Module)
    return student


def test_plans_and_teachers() -> None:
    student = make_student()
    plan: ExpansionPlan = plan_expansion(student, ratio=2, classifier='fc')
    ratio: int = plan.ratio
    wide: Dict[str, torch.Tensor] = plan.expand(student.state_dict())
    narrow: Dict[str, torch.Tensor] = plan.extract(wide)
    assert ratio == 2 and all(torch.equal(narrow[name], tensor) for name, tensor in student.state_dict().items())

    teacher: DynamicTeacher = expand(student, ratio=2, num_branches=2, noise=0.1)
    x = torch.randn(2, 1, 32, 32)
    both: Tuple[torch.Tensor, torch.Tensor] = teacher.eval().joint(x)
    parameters: Dict[str, torch.Tensor] = teacher.student_parameters()
    extracted: nn.Module = teacher.extract_student()
    assert both[0].shape == both[1].shape == (2, 10)
    assert parameters.keys() == dict(extracted.named_parameters()).keys()
    assert issubclass(UnsupportedModelError, ValueError)
    teacher.reset_classifier(3)
    features: Any = teacher.forward_features(x)
    assert teacher.num_classes == 3 and teacher.forward_head(features).shape == (2, 3)


def test_tasks() -> None:
    x, target = torch.randn(4, 1, 32, 32), torch.arange(4)
    static = make_student()
    gpd = GapPreservingTask(make_student(), static_teacher=static, distill_type='dkd', verbose=False)
    plain = DistillationTask(make_student(), static, distill_type='dkd', distill_args={'beta': 2.0}, verbose=False)
    larger = StaticTeacherConfig(make_student(), img_size=64, class_map=range(10), dtype=torch.bfloat16, device='cpu')
    several = DistillationTask(make_student(), [static, larger], distill_type='kd,nd@2', verbose=False)
    for result in (gpd.train()(x, target), plain.train()(x, target), several.train()(x, target)):
        terms: Dict[str, torch.Tensor] = result
        torch.autograd.backward(terms['loss'])
    teacher: DynamicTeacher = gpd.get_dynamic_teacher()
    assert all(parameter.grad is not None for parameter in teacher.parameters())
    alone = DistillationTask(gpd.get_student(), static, distill_type='dkd', verbose=False)
    optimizers = [torch.optim.SGD(task.get_learners().parameters(), lr=0.1) for task in (gpd, alone)]
    hand_over(gpd, optimizers[0], alone, optimizers[1])


def test_losses_and_rules() -> None:
    student, teacher, target = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0]] * 2), torch.tensor([0, 1])
    losses: List[torch.Tensor] = [
        kd_loss(student, teacher, temperature=2.0),
        dkd_loss(student, teacher, target),
        soft_target_cross_entropy(student, teacher),
        *(loss(student, teacher, *([target] if needs_target(loss) else [])) for loss in GPD_LOSSES.values()),
    ]
    assert all(loss.shape == () and loss > 0 for loss in losses)

    class Counting(nn.Module):
        heads = 2

    def heads(module: nn.Module) -> int:
        return 4

    def code(context: Any) -> None:
        context.set('heads', 4)

    rule: Rule = register_rule(Counting, Rule(multiply=('heads',), blocks={'qkv.out': heads}, code=code))
    assert find_rule(Counting()) is rule
    assert timm_gpd.rules.find_rule(nn.Identity()) is None
