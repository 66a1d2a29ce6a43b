"""Students as people have them: wrapped, of torchvision, of their own, with other channels than their teacher."""

import contextlib

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision.models
from timm.optim import create_optimizer_v2

from conftest import TINY_RESNET
from steps import batch, train
from timm_gpd import DistillationTask, DynamicTeacher, GapPreservingTask, UnsupportedModelError, expand, plan_expansion
from timm_gpd.expansion.student import count_classes
from timm_gpd.task.given_teacher import resolve_static_teacher
from timm_gpd.task.static_teacher import StaticTeacher

TASKS = [DistillationTask, GapPreservingTask]


class Own(nn.Module):
    """What a user may write: two heads, no word of timm."""

    def __init__(self, channels=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
        )
        self.near, self.far = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return self.near(x) + self.far(x)


def sgd(task):
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)


@contextlib.contextmanager
def process_group(folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WRAPPERS = {
    'DataParallel': nn.DataParallel,
    'DDP of compiled': lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrappers_are_looked_through(tiny_student, wrapper, tmp_path):
    with process_group(tmp_path) if 'DDP' in wrapper else contextlib.nullcontext():
        wrapped = WRAPPERS[wrapper](tiny_student)
        assert plan_expansion(wrapped) == plan_expansion(tiny_student)
        x = batch()[0]
        with torch.no_grad():
            torch.testing.assert_close(expand(wrapped).eval()(x), tiny_student.eval()(x), rtol=1e-4, atol=1e-5)
        keys = tiny_student.state_dict().keys()
        for task_class in TASKS:
            task = task_class(wrapped, make_teacher(), verbose=False).train()
            train(task, sgd(task), 1)
            assert task.get_checkpoint_state()['state_dict'].keys() == keys
            assert type(task.get_student()) is type(tiny_student)


def make_teacher():
    return timm.create_model('test_resnet', **TINY_RESNET)


@pytest.mark.parametrize(
    'name, classifier',
    [('resnet18', 'fc'), ('mobilenet_v3_small', 'classifier'), ('googlenet', ('fc', 'aux1.fc2', 'aux2.fc2'))],
)
def test_torchvisions_models_expand_once_their_classifier_is_named(name, classifier):
    settings = dict(init_weights=False) if name == 'googlenet' else {}
    student = getattr(torchvision.models, name)(num_classes=7, **settings)
    with pytest.raises(UnsupportedModelError, match="classifier='fc'") as error:
        plan_expansion(student)
    assert '\n' not in str(error.value)
    plan = plan_expansion(student, classifier=classifier)
    names = (classifier,) if isinstance(classifier, str) else classifier
    widened = [plan.tensors[f'{name}.weight'] for name in names if f'{name}.weight' in plan.tensors]
    assert all(tensor_map.teacher_shape[0] == tensor_map.shape[0] == 7 for tensor_map in widened)
    if name == 'resnet18':
        x = torch.randn(2, 3, 64, 64)
        teacher = DynamicTeacher(student, plan).eval()
        with torch.no_grad():
            torch.testing.assert_close(teacher(x), student.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_classifier_that_is_not_there_or_gives_nothing():
    with pytest.raises(UnsupportedModelError, match="Own has no module 'head': check classifier='head'"):
        plan_expansion(Own(), classifier='head')
    with pytest.raises(UnsupportedModelError, match=r"classifier 'body.2' of Own has no parameters"):
        plan_expansion(Own(), classifier='body.2')


@pytest.mark.parametrize('task_class', TASKS)
def test_a_student_without_records_beside_a_static_teacher(task_class):
    """No num_classes, no in_chans, no config: classes come from its logits, channels from its first convolution."""
    student = Own()
    assert count_classes(student) == 10
    settings = dict(classifier=('near', 'far')) if task_class is GapPreservingTask else {}
    task = task_class(student, Own(), verbose=False, **settings).train()
    losses = train(task, sgd(task), 3)
    assert losses[-1] < losses[0] * 1.5
    plain = Own()
    plain.load_state_dict(task.get_student().state_dict())
    other = Own()
    other.near, other.far = nn.Linear(16, 7), nn.Linear(16, 7)
    with pytest.raises(ValueError, match='static teacher has 7 classes and the student 10'):
        task_class(student, other, verbose=False, **settings)


@pytest.mark.parametrize('name', ['cait_xxs24_224', 'test_vit'])
def test_layer_decay_in_a_task_is_that_of_plain_training(name):
    student = timm.create_model(name, num_classes=5, img_size=64, depth=2)

    def scales(model):
        groups = create_optimizer_v2(model, opt='sgd', weight_decay=0.1, layer_decay=0.7).param_groups
        return sorted((group['lr_scale'], group['weight_decay'], len(group['params'])) for group in groups)

    assert scales(GapPreservingTask(student, verbose=False).get_trainable_module()) == scales(student)


def grey_and_rgb(channels, mean, std, seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model('test_resnet', **{**TINY_RESNET, 'in_chans': channels}).eval()
    model.pretrained_cfg.update(mean=mean, std=std, input_size=(channels, 32, 32))
    return model


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OF_FOUR = dict(mean=(0.1, 0.2, 0.3, 0.4), std=(0.2, 0.3, 0.4, 0.5))


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('statistics', [IMAGENET, dict(mean=(0.4,), std=(0.3,))], ids=['three', 'one'])
def test_normalisation_follows_the_number_of_channels(channels, statistics):
    """Where the config is of other channels, the loader takes the mean of its statistics for all."""
    student, teacher = grey_and_rgb(channels, **statistics), grey_and_rgb(channels, **statistics, seed=4)
    teacher.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    static = StaticTeacher(resolve_static_teacher(teacher, student), student, {'kd': {}})
    x = torch.randn(2, channels, 32, 32)
    mean, std = (
        torch.tensor(values if len(values) == channels else [sum(values) / len(values)])
        for values in (statistics['mean'], statistics['std'])
    )
    pixels = x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    torch.testing.assert_close(static(x).logits, teacher((pixels - 0.5) / 0.5))


def test_a_grey_student_and_an_rgb_teacher_and_the_reverse():
    grey, rgb = grey_and_rgb(1, (0.4,), (0.3,)), grey_and_rgb(3, **IMAGENET)
    mean, std = (torch.tensor(IMAGENET[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    x = torch.randn(2, 1, 32, 32)
    static = StaticTeacher(resolve_static_teacher(rgb, grey), grey, {'kd': {}})
    torch.testing.assert_close(static(x).logits, rgb(((x * 0.3 + 0.4).expand(-1, 3, -1, -1) - mean) / std))
    x = torch.randn(2, 3, 32, 32)
    static = StaticTeacher(resolve_static_teacher(grey, rgb), rgb, {'kd': {}})
    torch.testing.assert_close(static(x).logits, grey(((x * std + mean).mean(1, keepdim=True) - 0.4) / 0.3))
    for task_class in TASKS:
        task = task_class(grey_and_rgb(1, (0.4,), (0.3,)), rgb, verbose=False).train()
        train(task, sgd(task), 1)


def test_other_channels_are_refused_in_words():
    rgb, four = grey_and_rgb(3, **IMAGENET), grey_and_rgb(4, **OF_FOUR)
    for student, teacher, message in (
        (rgb, four, "4 channels and the student's have 3"),
        (four, rgb, "3 channels and the student's have 4"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            GapPreservingTask(student, teacher, verbose=False)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('channels', [1, 4])
def test_a_teacher_that_a_run_has_saved(channels, tmp_path):
    """Its config may hold three means, as one of an earlier version does."""
    from timm_gpd.student_folder import save_student

    teacher = grey_and_rgb(channels, **IMAGENET)
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in TINY_RESNET.items()
        if key not in ('in_chans', 'num_classes')
    }
    save_student(teacher, str(tmp_path / 'student'), dict(model_kwargs=settings))
    student = grey_and_rgb(channels, **IMAGENET, seed=5)
    task = GapPreservingTask(student, f'local-dir:{tmp_path}/student', verbose=False).train()
    x, target = torch.randn(4, channels, 32, 32), torch.arange(4)
    torch.testing.assert_close(task.static_teacher(x).logits, teacher(x))
    task(x, target)['loss'].backward()
