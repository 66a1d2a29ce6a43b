"""Teachers that change as the student trains: its moving average, and static ones with online modules."""

import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from steps import batch, train_epoch
from teachers import TASKS, kd, make_student, make_task, make_teacher
from timm_gpd import DistillationTask, EmaTeacherConfig, GapPreservingTask, StaticTeacherConfig, hand_over
from timm_gpd.distillers import Distillers, distill_settings
from timm_gpd.task.given_teacher import create_static_teacher
from timm_gpd.training.compute import create_compute

ORDINARY = EmaTeacherConfig(prob=1.0, momentum=0.9)
STEPS = 4


def sgd(task):
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)


def steps(task, optimizer, numbers):
    """Some of STEPS updates, each of a batch of its own, as the training loop takes them; yields behind each."""
    for number in numbers:
        task.begin_update(number, number / STEPS)
        optimizer.zero_grad()
        task(*batch(number))['loss'].backward()
        optimizer.step()
        task.update_ema(number + 1)
        yield number


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- the EMA teacher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task_class', TASKS)
def test_with_probability_1_it_is_timms_average(task_class):
    """Parameters, running statistics and counts of batches, bit for bit."""
    task = make_task(task_class, ORDINARY)
    expected = ModelEmaV3(task.get_student())
    for _ in steps(task, sgd(task), range(STEPS)):
        expected.decay = task.ema_teacher.momentum()
        expected.update(task.get_student())
        assert not moved(state(expected.module), state(task.ema_teacher.model))
    assert moved(state(task.get_student()), state(task.ema_teacher.model)) > {'conv1.0.weight', 'bn1.running_var'}


@pytest.mark.parametrize('task_class', TASKS)
def test_a_tensor_moves_as_it_should_or_stays_bit_for_bit(task_class):
    task = make_task(task_class, EmaTeacherConfig(prob=0.2, momentum=0.9))
    before, counts = state(task.ema_teacher.model), []
    statistics = [name.removesuffix('.running_mean') for name in before if name.endswith('.running_mean')]
    for _ in steps(task, sgd(task), range(STEPS)):
        own, student, momentum = state(task.ema_teacher.model), state(task.get_student()), task.ema_teacher.momentum()
        changed = moved(before, own)
        for name in changed:
            expected = student[name]
            if expected.is_floating_point():
                expected = momentum * before[name] + (1 - momentum) * expected
            torch.testing.assert_close(own[name], expected, rtol=1e-5, atol=1e-6)
        for norm in statistics:
            assert len({f'{norm}.{name}' in changed for name in ('running_mean', 'running_var')}) == 1
        counts.append(len(changed) / len(own))
        before = own
    assert len(set(counts)) > 1 and 0.1 < sum(counts) / STEPS < 0.3


def test_the_momentum_rises_by_a_cosine():
    teacher = make_task(DistillationTask, EmaTeacherConfig(momentum=0.9)).ema_teacher
    for progress, momentum in ((0, 0.9), (0.25, 1 - 0.1 * (math.sqrt(0.5) + 1) / 2), (0.5, 0.95), (1, 1)):
        teacher.begin_update(0, progress)
        assert teacher.momentum() == pytest.approx(momentum)


def test_what_moves_is_told_by_seed_and_number_of_the_update():
    """So a run that goes on, and all processes, draw the same; in a loop that tells nothing they count themselves."""
    task = make_task(DistillationTask, EmaTeacherConfig(momentum=0.5))
    teacher, student = task.ema_teacher, make_student()
    torch.nn.init.normal_(student.fc.bias)

    def drawn(update, config=teacher.config):
        twin = copy.deepcopy(teacher)
        twin.config = config
        twin.begin_update(update, 0.0)
        before = state(twin.model)
        twin.follow(student)
        return moved(before, state(twin.model))

    twin, found = copy.deepcopy(teacher), []
    for _ in range(3):
        before = state(twin.model)
        twin.follow(student)
        found.append(moved(before, state(twin.model)) & drawn(0).union(drawn(1), drawn(2)))
    assert found[0] == drawn(0) and drawn(0) != drawn(1) != drawn(2)
    assert drawn(0) == drawn(0) != drawn(0, EmaTeacherConfig(momentum=0.5, seed=1))


@pytest.mark.parametrize('task_class', TASKS)
def test_the_student_learns_from_it_and_it_from_nothing_else(task_class):
    """Alone and beside a static teacher, which both are learned from, each by its own loss and by their mean."""
    task = make_task(task_class, [make_teacher(), ORDINARY], 'kd,kd@2')
    list(steps(task, sgd(task), range(3)))
    images, target = batch()
    result = task(images, target)
    static, average = (model.teacher.model(images) for model in task.static_teacher.teachers)
    mean = (static.softmax(1) / 2 + average.softmax(1) / 2).log()
    torch.testing.assert_close(result['kd/kd@2'], kd(result['output'], average))
    torch.testing.assert_close(result['kd/kd'], kd(result['output'], mean))
    assert not torch.allclose(average, static) and task.ema_teacher is task.static_teacher.teachers[1]
    result['loss'].backward()
    assert all(parameter.grad is None for parameter in task.ema_teacher.parameters())
    assert [*task.get_teachers()] == ['static_', 'ema_teacher_']
    alone = make_task(task_class, ORDINARY)
    pointers = {tensor.data_ptr() for tensor in alone.get_trainable_module().state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in alone.ema_teacher.model.state_dict().values()}


@pytest.mark.parametrize('task_class', TASKS)
def test_a_checkpoint_holds_what_adapts_and_the_plain_student(task_class):
    """A task that goes on from it takes the same steps."""

    def make():
        return make_task(task_class, [online(make_teacher()), EmaTeacherConfig(momentum=0.5)])

    task = make()
    optimizer = sgd(task)
    list(steps(task, optimizer, range(3)))
    kept = copy.deepcopy([task.get_checkpoint_state(), optimizer.state_dict()])
    list(steps(task, optimizer, range(3, STEPS)))
    assert kept[0]['state_dict'].keys() == make_student().state_dict().keys()
    assert kept[0]['task_state']['ema_teacher'].keys() == kept[0]['state_dict'].keys()
    names = list(kept[0]['task_state']['online_modules'])
    assert names and all(name.startswith(('1.adapters.', '1.heads.')) for name in names)
    own = kept[0]['task_state'].keys() - {'dynamic_teacher'}
    assert own == {'settings', 'distillers', 'online_modules', 'ema_teacher'}
    other = make()
    twin = sgd(other)
    other.load_checkpoint_state(kept[0]['state_dict'], kept[0]['task_state'])
    twin.load_state_dict(kept[1])
    list(steps(other, twin, range(3, STEPS)))
    for one, two in zip(*(each.get_checkpoint_state()['task_state'].items() for each in (task, other))):
        assert one[0] == two[0] and (one[0] == 'settings' or not moved(one[1], two[1]))
    assert not moved(state(task.get_student()), state(other.get_student()))


def test_weights_of_half_precision_are_averaged_in_single():
    """A small share of bfloat16 would be rounded away."""
    student = make_student().to(torch.bfloat16)
    settings = distill_settings('feature,kd')
    teacher = create_static_teacher(EmaTeacherConfig(prob=1.0, momentum=0.999), student, settings)
    before = state(teacher.model)
    with torch.no_grad():
        student.fc.weight += 0.5
    teacher.follow(student)
    change = (teacher.model.fc.weight - before['fc.weight']).mean().item()
    assert teacher.model.fc.weight.dtype == torch.float32 and change == pytest.approx(0.0005, rel=0.1)
    output = teacher(batch()[0].to(torch.bfloat16))
    assert output.logits.dtype == output.embedding.dtype == torch.bfloat16


def test_what_a_model_has_computed_from_its_weights_goes_with_them():
    """LeViT keeps attention biases in evaluation mode."""
    widths = dict(embed_dim=(16, 16), num_heads=(2, 2), depth=(1, 1), key_dim=8)
    student = timm.create_model('levit_128s', img_size=64, in_chans=1, num_classes=10, **widths).eval()
    teacher = create_static_teacher(ORDINARY, student, distill_settings('kd'))
    images = torch.randn(2, 1, 64, 64)
    before = teacher(images).logits
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn_like(parameter)
    teacher.follow(student)
    twin = copy.deepcopy(student)
    twin.load_state_dict(teacher.model.state_dict())
    after = teacher(images).logits
    assert torch.equal(after, twin.train().eval()(images)) and not torch.allclose(after, before)
    teacher.model.load_state_dict(student.state_dict())
    assert torch.equal(teacher(images).logits, student.train().eval()(images))


@pytest.mark.parametrize(
    'config, message',
    [
        (EmaTeacherConfig(prob=0.0), 'prob of an EMA teacher must be above 0 and at most 1, but is 0.0'),
        (EmaTeacherConfig(momentum=1.0), 'momentum of an EMA teacher must be from 0 to below 1, but is 1.0'),
        (EmaTeacherConfig(momentum='0.9'), "momentum of an EMA teacher must be a finite number, but is '0.9'"),
        ([ORDINARY, ORDINARY], 'two EMA teachers of one student are given'),
    ],
)
def test_an_average_that_is_none_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_task(DistillationTask, config)


# -- online modules ---------------------------------------------------------------------------------------------------

# Features (B, C, H, W), (B, H, W, C) and (B, N, C), two classifiers, one that is a convolution, and stages that are not
# one tensor, where the head is all.
ARCHITECTURES = {
    'test_resnet': ({}, 4),
    'test_convnext': ({}, 4),
    'test_vit': (dict(img_size=32), 4),
    'swin_tiny_patch4_window7_224': (
        dict(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
        2,
    ),
    'deit_tiny_distilled_patch16_224': (dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2), 2),
    'resnetv2_50': (dict(layers=(1, 1), channels=(16, 32), stem_chs=8), 3),
    'pit_ti_224': (dict(img_size=32, base_dims=(8, 8), depth=(1, 1), heads=(1, 2)), 0),
}


def online(teacher, **kwargs):
    return StaticTeacherConfig(teacher, online_modules=True, **kwargs)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_it_starts_as_the_same_teacher_and_every_module_trains(name):
    kwargs, count = ARCHITECTURES[name]
    teacher = make_teacher(name, **kwargs)
    images, target = batch(size=4)
    before, logits = state(teacher), teacher(images)
    task = make_task(DistillationTask, online(teacher), 'kd')
    assert torch.equal(task.static_teacher(images).logits, logits)
    modules = task.static_teacher.online_modules
    assert len(modules.adapters) == count and len(modules.heads) == 1 + ('distilled' in name)
    list(steps(task, sgd(task), range(2)))
    task(images, target)['loss'].backward()
    assert all(parameter.grad.any() for parameter in modules.parameters())
    with torch.no_grad():
        assert not torch.allclose(task.static_teacher(images).logits, logits)
        assert torch.equal(teacher(images), logits)  # outside of a call the teacher is as it was
    assert not moved(before, state(teacher)) and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize('task_class', TASKS)
def test_frozen_weights_and_statistics_stay_bit_for_bit(task_class):
    teacher = make_teacher()
    before = state(teacher)
    task = make_task(task_class, online(teacher), 'reviewkd,kd')
    modules = state(task.static_teacher.online_modules)
    task.train()
    list(steps(task, sgd(task), range(STEPS)))
    assert not moved(before, state(teacher))
    assert moved(modules, state(task.static_teacher.online_modules)) == modules.keys()


@pytest.mark.parametrize('task_class', TASKS)
def test_modules_and_student_learn_from_each_other_as_given(task_class, monkeypatch):
    """By the formulas: no gradient of the student's losses reaches the modules, and none of theirs the student."""
    task = make_task(task_class, online(make_teacher()), 'kd,reviewkd', task_loss_weight=0.3, distill_loss_weight=0.7)
    list(steps(task, sgd(task), range(2)))
    images, target = batch(9)
    logits = task.static_teacher(images).logits
    forward, seen = Distillers.forward, []

    def take_down(distillers, learner, teacher, target):
        seen.extend(tensor.requires_grad for tensor in (teacher.logits, *teacher.stages, teacher.embedding))
        return forward(distillers, learner, teacher, target)

    monkeypatch.setattr(Distillers, 'forward', take_down)
    result = task(images, target)
    assert seen and not any(seen) and logits.requires_grad
    torch.testing.assert_close(result['kd/kd'], kd(result['output'], logits))
    probabilities = result['output'].detach().softmax(1)
    expected = F.cross_entropy(logits, target), F.kl_div(logits.log_softmax(1), probabilities, reduction='batchmean')
    torch.testing.assert_close((result['online_task_loss'], result['online_kd_loss']), expected)
    modules = list(task.static_teacher.online_modules.parameters())
    everything = [p for p in task.get_trainable_module().parameters() if not any(p is each for each in modules)]
    found = torch.autograd.grad(result['loss'], modules, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(sum(expected), modules))
    both = result['online_task_loss'] + result['online_kd_loss']
    assert set(torch.autograd.grad(both, everything, retain_graph=True, allow_unused=True)) == {None}


def test_of_several_teachers_each_has_its_own():
    """In another dtype, of other classes and for other images; an average beside them has none."""
    classes = [[index, index + 10] for index in range(10)]
    other = make_teacher('test_vit', num_classes=20, img_size=48)
    second = online(other, img_size=48, class_map=classes, dtype=torch.bfloat16)
    task = make_task(DistillationTask, [online(make_teacher()), second, ORDINARY], 'kd,dkd@2,kd@3')
    assert [*task.get_trainable_module().step_loss.online_modules] == ['1', '2']
    before = state(other)
    assert {p.dtype for p in task.static_teacher.teachers[1].online_modules.parameters()} == {torch.float32}
    list(steps(task, sgd(task), range(2)))
    images, target = batch(3)
    result, outputs = task(images, target), task.static_teacher(images).each
    terms = [F.cross_entropy(output.logits, target) for output in outputs[:2]]
    torch.testing.assert_close(result['online_task_loss'], sum(terms))
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in task.get_trainable_module().parameters())
    assert not moved(before, state(other))


@pytest.mark.parametrize('task_class', TASKS)
def test_modules_train_in_timms_loop_with_accumulation_clipping_and_amp(task_class):
    task = make_task(task_class, online(make_teacher()), 'kd', device=torch.device('cpu'))
    modules = task.static_teacher.online_modules
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-3, weight_decay=0.1)
    groups = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert {groups[id(p)] for p in modules.parameters() if p.dim() > 1} == {0.1}
    assert {groups[id(p)] for p in modules.parameters() if p.dim() == 1} == {0.0}
    assert {id(p) for p in modules.parameters()} <= {id(p) for p in task.get_clip_parameters()}
    before = state(modules)
    compute = create_compute('cpu', amp=True, amp_dtype='bfloat16')
    batches = [batch(number) for number in range(4)]  # of two updates: in the first the last layers leave zero alone
    means = train_epoch(task, batches, optimizer, compute, grad_accum_steps=2, clip_grad=5.0)
    assert math.isfinite(means['online_kd_loss']) and moved(before, state(modules)) == before.keys()


@pytest.mark.parametrize('task_class', TASKS)
def test_a_compiler_is_refused(task_class):
    task = make_task(task_class, [online(make_teacher()), ORDINARY])
    with pytest.raises(ValueError, match='online modules are hooked into a static teacher, which a compiler cannot'):
        task.compile(backend='eager')


class Headless(torch.nn.Module):
    """A teacher whose classifier nobody names."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 10, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_a_teacher_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match='Headless has no classifier, beside which online modules have a head'):
        make_task(DistillationTask, online(Headless()))


# -- two processes ----------------------------------------------------------------------------------------------------


def train_half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for task_class in TASKS:
        torch.manual_seed(0)
        task = make_task(task_class, [online(make_teacher()), EmaTeacherConfig(momentum=0.5)], 'kd,kd@2')
        task.prepare_distributed()
        optimizer, found = sgd(task), {}
        for number in range(3):
            task.begin_update(number, number / 3)
            optimizer.zero_grad()
            images, target = batch(number)
            part = slice(4 * rank, 4 * rank + 4)
            task(images[part], target[part])['loss'].backward()
            optimizer.step()
            statistics = state(task.get_student())  # of this process's images
            task.update_ema()
            found = {**found, **{f'{name} of the student, {number}': value for name, value in statistics.items()}}
        found.update(state(task.ema_teacher.model))
        modules = task.get_learners().step_loss.online_modules
        torch.save([found, state(modules)], f'{folder}/{task_class.__name__} {rank}.pt')
    dist.destroy_process_group()


def test_two_processes_have_the_same_teachers(tmp_path):
    mp.start_processes(train_half, args=(str(tmp_path),), nprocs=2, start_method='fork')
    for task_class in TASKS:
        (first, modules), (second, others) = (
            torch.load(tmp_path / f'{task_class.__name__} {rank}.pt') for rank in range(2)
        )
        assert not moved(modules, others)
        apart = moved(first, second)  # running statistics of the student alone, of other images in each process
        assert apart and all('of the student' in name and 'running_' in name for name in apart)


def test_a_hand_over_keeps_both():
    """From joint training to plain training: the teachers go on, and what the optimizer remembers of the modules."""
    static = online(make_teacher())
    before = make_task(GapPreservingTask, [static, EmaTeacherConfig(momentum=0.5)], 'kd')
    optimizer = sgd(before)
    list(steps(before, optimizer, range(2)))
    after = make_task(DistillationTask, before.static_teacher, 'kd', student=before.get_student())
    assert after.ema_teacher is before.ema_teacher
    modules = after.get_learners().step_loss.online_modules
    kept, average = state(modules), state(after.ema_teacher.model)
    later = sgd(after)
    hand_over(before, optimizer, after, later)
    assert not moved(kept, state(modules)) and not moved(average, state(after.ema_teacher.model))
    for parameter in modules.parameters():
        assert torch.equal(later.state[parameter]['momentum_buffer'], optimizer.state[parameter]['momentum_buffer'])
    list(steps(after, later, range(2, 4)))
    assert moved(average, state(after.ema_teacher.model))
