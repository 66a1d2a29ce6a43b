"""Static teachers of every kind: several, of other images, of other classes, in other precision."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import CheckpointSaver

from steps import batch
from teachers import TASKS, kd, make_student, make_task, make_teacher, terms_of
from timm_gpd import DistillationTask, StaticTeacherConfig

# -- several ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
def test_the_mean_of_several_is_that_of_their_probabilities(task_class):
    teachers = [make_teacher(seed=1), make_teacher('test_vit', img_size=32, seed=2, mean=0.2)]
    task = make_task(task_class, teachers)
    x, target = batch()
    mean = (teachers[0](x).softmax(1) + teachers[1]((x * 0.5 + 0.3) / 0.5).softmax(1)) / 2
    torch.testing.assert_close(task.static_teacher(x).logits.softmax(1), mean)
    for term, logits in terms_of(task(x, target), 'kd'):
        torch.testing.assert_close(term, kd(logits, mean.log()))


@pytest.mark.parametrize('task_class', TASKS)
def test_each_of_several_has_its_own_losses_and_weights(task_class):
    teachers = [make_teacher('test_efficientnet', seed=1), make_teacher('test_vit', img_size=32, seed=2)]
    arguments = {'kd@1.weight': 2, 'kd@2.temperature': 1, 'feature@1.weight': 0.5}
    task = make_task(task_class, teachers, 'kd@1,kd@2,feature@1,dist', distill_args=arguments)
    x, target = batch()
    result = task(x, target)
    for term, logits in terms_of(result, 'kd@1'):
        torch.testing.assert_close(term, 2 * kd(logits, teachers[0](x)))
    for term, logits in terms_of(result, 'kd@2'):
        torch.testing.assert_close(term, kd(logits, teachers[1](x), temperature=1))
    result['loss'].backward()
    assert [name for name, p in task.get_trainable_module().named_parameters() if p.grad is None] == []
    widths = {
        name: distillers['feature@1'].projection.weight.shape
        for name, distillers in task.get_learners().step_loss.distillers.items()
    }
    assert widths['student'] == (teachers[0].num_features, 64) != (64, 64)

    state = task.get_checkpoint_state()
    make_task(task_class, teachers, 'kd@1,kd@2,feature@1,dist', distill_args=arguments).load_checkpoint_state(
        state['state_dict'], state['task_state']
    )


@pytest.mark.parametrize(
    'types, count, message',
    [
        ('reviewkd', 2, 'reviewkd compares features, of which 2 static teachers have no mean: .* as in reviewkd@1'),
        ('kd@3', 2, 'kd@3 is of none of the 2 static teachers: they are numbers 1, 2'),
        ('kd@0', 2, 'kd@0 is of none'),
        ('kd@x', 2, 'kd@x is of none'),
        ('kd@1', 1, 'there is one: it is kd'),
        ('kd@1,logit@1', 2, 'names a distillation loss twice'),
        ('kdd@1', 2, "'kdd@1' is not a distillation loss"),
    ],
)
def test_losses_of_teachers_that_there_are_not(types, count, message):
    with pytest.raises(ValueError, match=message) as error:
        make_task(DistillationTask, [make_teacher() for _ in range(count)], types)
    assert '\n' not in str(error.value)


def test_no_teacher_in_a_list():
    with pytest.raises(ValueError, match='list of static teachers is empty'):
        make_task(DistillationTask, [])
    with pytest.raises(ValueError, match='a name or a module, but not 3'):
        make_task(DistillationTask, 3)
    student = make_student()
    with pytest.raises(ValueError, match='is the student itself'):
        make_task(DistillationTask, [make_teacher(), student], student=student)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
@pytest.mark.parametrize('types, size', [('kd', 64), ('kd', 16), ('reviewkd', 64)])
def test_a_teacher_of_other_images(task_class, types, size):
    """Another size, a stage of another size, other statistics; the result is that of images made by hand."""
    teacher = make_teacher('test_vit', img_size=size, mean=0.1, std=0.3)
    task = make_task(task_class, StaticTeacherConfig(teacher, img_size=size), types)
    x, target = batch()
    resized = F.interpolate((x * 0.5 + 0.5 - 0.1) / 0.3, (size, size), mode='bilinear', antialias=True)
    torch.testing.assert_close(task.static_teacher(x).logits, teacher(resized), rtol=1e-4, atol=1e-5)
    result = task(x, target)
    for term, logits in terms_of(result, 'kd') if types == 'kd' else ():
        torch.testing.assert_close(term, kd(logits, teacher(resized)), rtol=1e-4, atol=1e-5)
    result['loss'].backward()
    assert task.static_teacher(batch()[0][..., :24, :24]).logits.shape == (8, 10)  # images of any size


def test_a_size_that_the_teacher_does_not_take_is_answered_with_the_flag():
    with pytest.raises(ValueError, match='test_vit takes no images of 32 x 32 pixels .* by --kd-img-size') as error:
        make_task(DistillationTask, make_teacher('test_vit', img_size=64, dynamic_img_size=False))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'test_efficientnet'])
def test_a_name_is_created_for_the_size(name, tmp_path):
    weights = make_teacher(name, **(dict(img_size=48) if 'deit' in name else {}))
    torch.save(weights.state_dict(), tmp_path / 'teacher.pth')
    config = StaticTeacherConfig(name, path=str(tmp_path / 'teacher.pth'), img_size=48)
    task = make_task(DistillationTask, config)
    assert task.static_teacher(batch()[0]).logits.shape == (8, 10)


def test_other_statistics_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        make_task(DistillationTask, make_teacher())
        rgb = make_teacher()
        rgb.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3)
        make_task(DistillationTask, rgb)
        assert caplog.text == ''
        make_task(DistillationTask, make_teacher(mean=0.25, std=0.125))
    assert (
        "the student's images have mean (0.5) and standard deviation (0.5), and the static teacher test_resnet expects "
        'mean (0.25) and standard deviation (0.125): they are normalised again for it'
    ) in caplog.text


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
def test_more_classes_and_a_map(task_class):
    """Probabilities of the student's classes are sums of the teacher's, over those that are the student's at all."""
    teacher = make_teacher(num_classes=30)
    class_map = [3, 29, [1, 2], *np.arange(10, 17)]
    task = make_task(task_class, StaticTeacherConfig(teacher, class_map=class_map), 'kd,nd')
    x, target = batch()
    probabilities = teacher(x).softmax(1)
    columns = [probabilities[:, row if isinstance(row, list) else [row]].sum(1) for row in class_map]
    expected = torch.stack(columns, 1)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(task.static_teacher(x).logits.softmax(1), expected)
    for term, logits in terms_of(task(x, target), 'kd'):
        torch.testing.assert_close(term, kd(logits, expected.log()))


@pytest.mark.parametrize(
    'class_map, message',
    [
        (range(9), 'the class map is of 9 classes and the student has 10'),
        (
            [*range(9), 30],
            "gives the student's class 9 the static teacher's 30, and its classes are numbers from 0 to 29",
        ),
        ([*range(9), -1], "the static teacher's -1"),
        ([*range(9), 'cat'], "the static teacher's 'c'"),
        ([*range(9), []], "the student's class 9 none"),
        (None, 'static teacher has 30 classes and the student 10: .* or a class map'),
    ],
)
def test_maps_that_are_none(class_map, message):
    with pytest.raises(ValueError, match=message):
        make_task(DistillationTask, StaticTeacherConfig(make_teacher(num_classes=30), class_map=class_map))


def test_a_file_of_more_classes(tmp_path):
    teacher = make_teacher('test_efficientnet', num_classes=30)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    config = StaticTeacherConfig('test_efficientnet', path=str(tmp_path / 'teacher.pth'), class_map=range(20, 30))
    task = make_task(DistillationTask, config)
    # A name's statistics are those of its weights.
    mean, std = (sum(teacher.default_cfg[key]) / len(teacher.default_cfg[key]) for key in ('mean', 'std'))
    assert task.static_teacher.teacher.model.num_classes == 30
    assert math.isfinite(mean + std)
    torch.testing.assert_close(
        task.static_teacher.teacher.model.state_dict(), teacher.state_dict(), msg='the weights of the file'
    )


# -- precision and place ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_another_precision(task_class, dtype):
    teacher = make_teacher(mean=0.2)
    x, target = batch()
    expected = teacher((x * 0.5 + 0.5 - 0.2) / 0.5)
    task = make_task(task_class, StaticTeacherConfig(teacher, dtype=dtype, device='cpu', img_size=32), 'kd,feature,at')
    assert all(p.dtype == dtype for p in task.teacher.parameters())
    found = task.static_teacher(x)
    assert {found.logits.dtype, found.embedding.dtype, *(stage.dtype for stage in found.stages)} == {torch.float32}
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    task(x, target)['loss'].backward()


def test_a_module_of_its_own_precision_stays_as_it_is():
    task = make_task(DistillationTask, make_teacher().double())
    assert task.static_teacher(batch()[0]).logits.dtype == torch.float32
    assert all(p.dtype == torch.float64 for p in task.teacher.parameters())


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(img_size=0), 'img_size of a static teacher must be an integer of at least 1, but is 0'),
        (dict(img_size='64'), "but is '64'"),
        (dict(dtype=torch.int8), 'dtype of a static teacher must be one of floating point'),
        (dict(dtype='bfloat16'), "but is 'bfloat16'"),
        (dict(path='a.pth'), 'path a.pth is of a static teacher that is named, and this one is a module'),
        (dict(device='gpu'), 'static teacher cannot be put on device gpu: '),
    ],
)
def test_arguments_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_task(DistillationTask, StaticTeacherConfig(make_teacher(), **arguments))
    assert '\n' not in str(error.value)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(ValueError, match='static teacher cannot be put on device cuda:7: ') as error:
        make_task(DistillationTask, StaticTeacherConfig(make_teacher(), device='cuda:7'))
    assert '\n' not in str(error.value)


def test_precision_of_the_student_is_not_the_teachers():
    task = make_task(
        DistillationTask,
        StaticTeacherConfig(make_teacher(), dtype=torch.float32, img_size=48),
        student=make_student().bfloat16(),
        dtype=torch.bfloat16,
    )
    x, target = batch()
    task(x.bfloat16(), target)['loss'].backward()
    assert task.static_teacher(x.bfloat16()).logits.dtype == torch.bfloat16


class OwnModule(nn.Module):
    """A teacher without any of timm's attributes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 10))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize('task_class', TASKS)
@pytest.mark.parametrize('several', [False, True])
def test_teachers_stay_in_evaluation_mode_and_out_of_checkpoints(task_class, several, tmp_path):
    own = OwnModule().train()
    task = make_task(task_class, [own, make_teacher()] if several else own)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    before = copy.deepcopy(own.state_dict())
    for mode in (True, False, True):
        task.train(mode)
        task.static_teacher.train(mode)
        assert not any(module.training for module in task.static_teacher.modules()) and not own.training
    x, target = batch()
    task(x, target)['loss'].backward()
    optimizer.step()
    saver.save_checkpoint(0, metric=1.0)
    checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    assert all(p.grad is None and not p.requires_grad for p in own.parameters())
    assert not any(tensor is own.layers[2].weight for tensor in task.get_clip_parameters())
    shapes = {tuple(value.shape) for value in tensors_of(checkpoint)}
    assert (10, 1024) not in shapes and shapes
    torch.testing.assert_close(own.state_dict(), before)


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(value)


# -- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
def test_widths_of_features_are_checked(task_class):
    teacher = make_teacher('test_vit', img_size=32)
    make_task(task_class, teacher, 'feature', student_feature_dim=64, teacher_feature_dim=teacher.num_features)
    with pytest.raises(ValueError, match="the student's features have width 64, and not 65"):
        make_task(task_class, teacher, 'feature', student_feature_dim=65)
    with pytest.raises(ValueError, match=f"static teacher's features have width {teacher.num_features}, and not 1"):
        make_task(task_class, teacher, 'feature', teacher_feature_dim=1)
    with pytest.raises(ValueError, match="no loss compares the student's features"):
        make_task(task_class, teacher, 'kd', student_feature_dim=64)
