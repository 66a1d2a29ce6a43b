"""Static teachers in the tasks: every loss, with a dynamic teacher and without."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from conftest import TINY_RESNET
from steps import batch, train
from timm_gpd import DistillationTask, GapPreservingTask, StaticTeacherConfig
from timm_gpd.distillers import DISTILLERS
from timm_gpd.losses import dist_loss, dkd_loss
from timm_gpd.task.given_teacher import resolve_static_teacher
from timm_gpd.task.static_teacher import StaticTeacher

EVERY = 'kd,feature,dkd,reviewkd,dist,ofa,nd,rkd,at'
WITH_STATE = 'reviewkd,ofa,nd'
TASKS = [DistillationTask, GapPreservingTask]


def make_student():
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


def make_teacher(num_classes=10, seed=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = timm.create_model('test_vit', num_classes=num_classes, in_chans=1, img_size=32)
    teacher.pretrained_cfg.update(mean=(0.3,), std=(0.2,))
    return teacher


def make_task(task_class, distill_type, student=None, **kwargs):
    return task_class(
        student or make_student(), make_teacher(), distill_type=distill_type, verbose=False, **kwargs
    ).train()


def sgd(task):
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize('task_class', TASKS)
@pytest.mark.parametrize('name', sorted(DISTILLERS.keys() - {'logit', 'nd', 'feature', 'token'} | {'nd,feature'}))
def test_every_loss_trains_everything(task_class, name):
    """Distillers of both learners and the learners themselves get gradients; the teacher does not."""
    task = make_task(task_class, name, distill_loss_weight=0.7, task_loss_weight=0.3)
    result = task(*batch())
    names = name.split(',')
    prefixes = ['kd', 'teacher_kd'] if task_class is GapPreservingTask else ['kd']
    assert [key for key in result if '/' in key] == [f'{prefix}/{name}' for prefix in prefixes for name in names]
    tasks = sum(result[key] for key in ('task_loss', 'teacher_task_loss') if key in result)
    terms = sum(result[key] for key in result if '/' in key)
    torch.testing.assert_close(result['loss'], 0.3 * tasks + 0.7 * terms + 3 * result.get('gpd_loss', 0))
    result['loss'].backward()
    assert [name for name, p in task.get_trainable_module().named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in task.teacher.parameters())


def test_logit_is_timms_task():
    student, teacher = make_student(), make_teacher()
    common = dict(distill_loss_weight=0.7, task_loss_weight=0.3, temperature=2.0, verbose=False)
    ours = DistillationTask(student, copy.deepcopy(teacher), **common).train()
    theirs = LogitDistillationTask(copy.deepcopy(student), teacher, criterion=nn.CrossEntropyLoss(), **common).train()
    x, target = batch()
    ours, theirs = ours(x, target), theirs(x, target)
    for key in ('loss', 'output', 'task_loss'):
        torch.testing.assert_close(ours[key], theirs[key])
    torch.testing.assert_close(ours['kd/logit'], theirs['kd_loss'])


@pytest.mark.parametrize('task_class', TASKS)
def test_terms_are_those_of_the_outputs(task_class):
    """The logits that are compared are those in the result, and the teacher sees images normalised its own way."""
    task = make_task(task_class, 'dkd,dist')
    x, target = batch()
    result = task(x, target)
    static_output = make_teacher().eval()((x * 0.5 + 0.5 - 0.3) / 0.2)
    for prefix, output in (('kd', 'output'), ('teacher_kd', 'teacher_output')):
        if output in result:
            torch.testing.assert_close(result[f'{prefix}/dkd'], dkd_loss(result[output], static_output, target))
            torch.testing.assert_close(result[f'{prefix}/dist'], dist_loss(result[output], static_output))


def test_gpd_shares_gradients_of_both_learners():
    """Feature losses of the student reach the stored parameters through what the student runs on."""
    task = make_task(GapPreservingTask, 'reviewkd', task_loss_weight=0.0, gpd_weight=0.0)
    result = task(*batch())
    wide = task.get_dynamic_teacher().wide.conv1[0].weight
    (students,) = torch.autograd.grad(result['kd/reviewkd'], wide, retain_graph=True)
    assert students[0, 0].any() and not students[1].any()  # replica 0 alone is the student
    (both,) = torch.autograd.grad(result['loss'], wide)
    assert (both - students)[0, 0].any() and both[1].any()


def test_without_distillers_the_joint_pass_is_the_same():
    student = make_student()
    torch.manual_seed(0)
    plain = GapPreservingTask(copy.deepcopy(student), verbose=False, noise=0.1).train()
    torch.manual_seed(0)
    taught = make_task(GapPreservingTask, EVERY, copy.deepcopy(student), noise=0.1)
    x, target = batch()
    expected, result = plain(x, target), taught(x, target)
    for key in ('output', 'teacher_output', 'task_loss', 'gpd_loss'):
        torch.testing.assert_close(result[key], expected[key])
    for (name, ours), theirs in zip(
        taught.get_dynamic_teacher().named_buffers(), plain.get_dynamic_teacher().buffers()
    ):
        torch.testing.assert_close(ours, theirs, msg=name)  # one pass: running statistics moved once


@pytest.mark.parametrize('task_class', TASKS)
def test_soft_targets(task_class):
    """The task loss is that of the mixture; a static teacher's losses take the most probable class, but for nd."""
    x, target = batch()
    soft = F.one_hot(target, 10) * 0.6 + F.one_hot(target.flip(0), 10) * 0.4
    task = make_task(task_class, EVERY, criterion=SoftTargetCrossEntropy())
    results = []
    for labels, twin in ((soft, task), (F.one_hot(target, 10).float(), copy.deepcopy(task))):
        torch.manual_seed(1)  # distillers have dropout
        results.append(twin(x, labels))
    mixed, hard = results
    assert len(mixed) > len(EVERY.split(','))
    for key, value in mixed.items():
        if '/' in key and not key.endswith('/nd'):
            torch.testing.assert_close(value, hard[key], msg=key)
        elif '/' in key:
            assert not torch.allclose(value, hard[key]), key
        elif key.endswith('task_loss'):
            logits = mixed[key.replace('task_loss', 'output')]
            torch.testing.assert_close(
                value, 0.6 * F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(logits, target.flip(0))
            )


@pytest.mark.parametrize('task_class', TASKS)
def test_checkpoint_is_a_plain_student_and_resumes(task_class, tmp_path):
    task = make_task(task_class, WITH_STATE)
    optimizer = sgd(task)
    task.setup_ema(decay=0.9)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    train(task, optimizer, 2)
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')

    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys() == make_student().state_dict().keys()
    keys = {'settings', 'distillers'} | ({'dynamic_teacher'} if task_class is GapPreservingTask else set())
    assert checkpoint['task_state'].keys() == checkpoint['task_state_ema'].keys() == keys
    averaged = task.get_eval_model(ema=True)(batch()[0]).detach()
    name = next(name for name in checkpoint['task_state']['distillers'] if name.endswith('class_centers'))
    assert not torch.equal(*(checkpoint[key]['distillers'][name] for key in ('task_state', 'task_state_ema')))

    task.train()
    expected = train(task, optimizer, 2, first=2)
    resumed = make_task(task_class, WITH_STATE)
    optimizer = sgd(resumed)
    assert resume_task_checkpoint(resumed, path, optimizer=optimizer) == 1
    resumed.setup_ema(decay=0.9)
    load_task_ema_checkpoint(resumed, path)
    assert torch.equal(resumed.get_eval_model(ema=True).eval()(batch()[0]), averaged)
    assert train(resumed.train(), optimizer, 2, first=2) == expected


@pytest.mark.parametrize('task_class', TASKS)
def test_state_of_other_losses_is_refused(task_class):
    state = make_task(task_class, 'reviewkd').get_checkpoint_state()
    for other in (make_task(task_class, 'ofa'), make_task(task_class, 'reviewkd', distill_args={'weight': 2})):
        with pytest.raises(ValueError, match='resume with the settings of the checkpoint'):
            other.load_checkpoint_state(state['state_dict'], state['task_state'])
    del state['task_state']['distillers'][next(iter(state['task_state']['distillers']))]
    with pytest.raises(RuntimeError, match='Missing key'):
        make_task(task_class, 'reviewkd').load_checkpoint_state(state['state_dict'], state['task_state'])


@pytest.mark.parametrize('task_class', TASKS)
def test_layer_decay_and_weight_decay_are_the_students(task_class):
    def student():
        student = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=32)
        student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
        return student

    task = make_task(task_class, WITH_STATE, student())
    plain, ours = (
        create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.7)
        for model in (student(), task.get_trainable_module())
    )
    distillers = set(task.get_learners().step_loss.distillers.parameters())

    def groups(optimizer):
        sizes = {}
        for group in optimizer.param_groups:
            key = group['lr_scale'], group['weight_decay']
            sizes[key] = sizes.get(key, 0) + len([p for p in group['params'] if p not in distillers])
        return {key: size for key, size in sizes.items() if size}

    assert groups(ours) == groups(plain)
    scales = {group['lr_scale'] for group in ours.param_groups if distillers & set(group['params'])}
    assert scales == {1.0}


@pytest.mark.parametrize(
    'task_class, settings', [(DistillationTask, {}), (GapPreservingTask, {}), (GapPreservingTask, {'num_branches': 6})]
)
def test_clipping_spares_the_head_of_the_model_alone(task_class, settings):
    task = make_task(task_class, WITH_STATE, **settings)
    everything, clipped = (set(task.get_clip_parameters(exclude_head=flag)) for flag in (False, True))
    assert everything == set(task.get_trainable_module().parameters())
    model = task.get_dynamic_teacher().wide if task_class is GapPreservingTask else task.get_eval_model()
    assert everything - clipped == set(model.fc.parameters())


@pytest.mark.parametrize('task_class', TASKS)
def test_bad_input(task_class):
    with pytest.raises(ValueError, match="'kdd' is not a distillation loss: choose of logit, kd"):
        make_task(task_class, 'kdd')
    with pytest.raises(ValueError, match='static teacher has 7 classes and the student 10'):
        task_class(make_student(), make_teacher(7), verbose=False)
    with pytest.raises(ValueError, match='Sequential has no forward_intermediates|Sequential has no forward_features'):
        task_class(make_student(), nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), distill_type='at', verbose=False)


def test_teacher_from_a_file(tmp_path):
    student = make_student()
    teacher = timm.create_model('test_efficientnet', num_classes=10, in_chans=1)
    torch.save({'state_dict': teacher.state_dict()}, tmp_path / 'teacher.pth.tar')
    given = StaticTeacherConfig('test_efficientnet', path=str(tmp_path / 'teacher.pth.tar'))
    loaded = resolve_static_teacher(given, student)
    x = batch()[0]
    torch.testing.assert_close(loaded(x), teacher.eval()(x))

    def fails(message, name='test_efficientnet', classes=10, file='teacher.pth.tar'):
        other = timm.create_model('test_resnet', num_classes=classes, in_chans=1)
        with pytest.raises(ValueError, match=message) as error:
            resolve_static_teacher(StaticTeacherConfig(name, path=str(tmp_path / file)), other)
        assert '\n' not in str(error.value) and len(str(error.value)) < 300

    (tmp_path / 'broken.pth').write_bytes(b'no checkpoint')
    fails('checkpoint .*missing.pth does not exist', file='missing.pth')
    fails('broken.pth cannot be read as a checkpoint', file='broken.pth')
    fails('static teacher has 10 classes and the student 7', classes=7)
    fails('does not fit test_vit: .*Missing key.* and 77 more', name='test_vit')
    torch.save({**teacher.state_dict(), 'bn1.weight': torch.zeros(3)}, tmp_path / 'narrow.pth')
    fails('does not fit test_efficientnet: size mismatch for bn1.weight', file='narrow.pth')


def test_static_teacher_stays_as_it_is():
    settings = {'nd': {}}
    teacher = StaticTeacher(resolve_static_teacher(make_teacher(), make_student()), make_student(), settings)
    assert not any(module.training for module in teacher.train().modules())
    output = teacher(batch()[0])
    assert not output.logits.requires_grad and output.embedding.shape == (8, make_teacher().num_features)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        student = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=32)
        student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
        student.set_grad_checkpointing(enable)
        task = make_task(GapPreservingTask, WITH_STATE, student)
        torch.manual_seed(1)
        task(*batch())['loss'].backward()
        gradients.append([p.grad for p in task.get_trainable_module().parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)
