"""Students with a distillation token, which learns from a static teacher, with a dynamic teacher and without."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.task import TokenDistillationTask

from programs import summary, train
from steps import batch
from teachers import TASKS, make_task, make_teacher, make_token_student
from timm_gpd import DistillationTask, GapPreservingTask


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_token_is_timms_task(kind):
    teacher = make_teacher()
    common = dict(distill_loss_weight=0.7, task_loss_weight=0.3, temperature=2.0, verbose=False)
    ours = make_task(
        DistillationTask,
        copy.deepcopy(teacher),
        'token',
        make_token_student(),
        token_distill_type=kind,
        **{key: value for key, value in common.items() if key != 'verbose'},
    )
    theirs = TokenDistillationTask(
        make_token_student(), teacher, criterion=nn.CrossEntropyLoss(), distill_type=kind, **common
    ).train()
    x, target = batch()
    ours, theirs = ours(x, target), theirs(x, target)
    for key in ('loss', 'output', 'task_loss'):
        torch.testing.assert_close(ours[key], theirs[key])
    torch.testing.assert_close(ours['kd/token'], theirs['distill_loss'])


@pytest.mark.parametrize('task_class', TASKS)
def test_token_beside_other_losses(task_class):
    """Of both learners; the student is validated by the mean of its logits, and the one that was given is as it was."""
    student = make_token_student()
    task = make_task(task_class, make_teacher(), 'token,kd,nd,reviewkd', student)
    x, target = batch()
    result = task(x, target)
    learners = ['kd', 'teacher_kd'] if task_class is GapPreservingTask else ['kd']
    assert [key for key in result if key.endswith('/token')] == [f'{name}/token' for name in learners]
    result['loss'].backward()
    assert [name for name, p in task.get_trainable_module().named_parameters() if p.grad is None] == []
    assert task_class is DistillationTask or not student.distilled_training
    logits = task.get_eval_model().eval()(x)
    assert logits.shape == (8, 10)
    with pytest.raises(ValueError, match='in training mode'):
        task.eval()(x, target)


def test_token_with_ratios_between_and_gap_control():
    task = make_task(
        GapPreservingTask, make_teacher(), 'token', make_token_student(), ratio=3, method='sandwich', noise=0.0
    )
    result = task(*batch())
    assert result['between_loss'] > 0 and result['teacher_kd/token'] > 0
    result['loss'].backward()


@pytest.mark.parametrize('task_class', TASKS)
def test_models_without_a_token_are_refused(task_class):
    with pytest.raises(ValueError, match='test_resnet has no set_distilled_training, which token would need'):
        make_task(task_class, make_teacher(), 'token')
    without = timm.create_model('pit_ti_224', num_classes=10)  # of a class that can have one
    with pytest.raises(ValueError, match='PoolingVisionTransformer is without a distillation token here'):
        make_task(task_class, make_teacher(), 'token', without)
    with pytest.raises(ValueError, match="token learns soft or hard, but not 'firm'"):
        make_task(task_class, make_teacher(), 'token', make_token_student(), token_distill_type='firm')


@pytest.mark.parametrize('kind', ['soft', 'hard'])
@pytest.mark.parametrize('config', ['digits', 'digits_gpd'])
def test_a_run_with_a_distillation_token(config, kind, tmp_path):
    torch.save(make_teacher().state_dict(), tmp_path / 'teacher.pth')
    train(
        tmp_path,
        *('--experiment', 'run', '--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'img_size=32'),
        *('patch_size=8', 'embed_dim=24', 'depth=2', 'num_heads=2', '--kd-distill-type', 'token'),
        *('--kd-token-distill-type', kind, '--kd-model-name', 'test_resnet'),
        *('--kd-model-path', tmp_path / 'teacher.pth'),
        config=config,
    )
    row = summary(tmp_path / 'run')[-1]
    assert float(row['train_kd/token']) > 0
    assert (float(row.get('train_teacher_kd/token', 0)) > 0) == (config == 'digits_gpd')
    student = timm.create_model(f'local-dir:{tmp_path / "run" / "student"}', pretrained=True).eval()
    assert student(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
