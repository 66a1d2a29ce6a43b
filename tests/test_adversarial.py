"""Robust students: attacks, what a task trains on under one, and the losses that compare several views of images."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask

from conftest import TINY_RESNET
from timm_gpd import DistillationTask, GapPreservingTask
from timm_gpd.losses import ADVERSARIAL_LOSSES, adaad_loss, dgad_loss, igdm_loss, swap_logits
from timm_gpd.private_torch import pre_hooks_of
from timm_gpd.task import Attack, create_attack, setup_adversary
from timm_gpd.task.adversary import Adversary

GREY = dict(mean=(0.5,), std=(0.25,))
KINDS = [dict(kind='fgsm'), dict(kind='pgd', steps=4), dict(kind='pgd', step=0.5, steps=2)]


def student(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', **{**TINY_RESNET, **kwargs})
    model.pretrained_cfg.update(input_size=(1, 32, 32), **GREY)
    return model


def batch(size=6, low=0.0, high=1.0, seed=1):
    """Normalised images of pixels between two numbers, some at both, and classes."""
    torch.manual_seed(seed)
    pixels = (torch.rand(size, 1, 32, 32) * 1.5 - 0.25).clamp(0, 1) * (high - low) + low
    return (pixels - 0.5) / 0.25, torch.arange(size) % 10


def cross_entropy(model, target):
    return lambda images: F.cross_entropy(model(images), target, reduction='sum')


# -- losses -----------------------------------------------------------------------------------------------------------


def views(*names, seed=0, size=40):
    torch.manual_seed(seed)
    return {name: 3 * torch.randn(size, 5, dtype=torch.float64) for name in names}


everything = functools.partial(views, 'clean', 'perturbed', 'mirrored')


def test_swapping_makes_the_label_the_largest_and_keeps_all_numbers():
    logits, target = views('a')['a'], torch.arange(40) % 5
    swapped = swap_logits(logits, target)
    assert torch.equal(swapped.argmax(1), target)
    assert torch.equal(swapped.sort(1).values, logits.sort(1).values)
    right = logits.argmax(1) == target
    assert 0 < right.sum() < 40
    assert torch.equal(swapped[right], logits[right])
    assert ((swapped != logits).sum(1)[~right] == 2).all()
    assert torch.equal(swap_logits(logits, F.one_hot(target, 5).double() * 0.9 + 0.02), swapped)


def test_dgad_is_the_sum_of_two_means_by_their_shares():
    """Of arXiv 2409.01627: clean images where the teacher misclassifies them, perturbed ones of the rest."""
    student, teacher = views('clean', 'perturbed'), views('clean', 'perturbed', seed=1)
    target = torch.arange(40) % 5
    errs = teacher['clean'].argmax(1) != target

    def divergence(view, images):
        labels = swap_logits(teacher[view], target).softmax(1)
        return (labels * (labels.log() - student[view].log_softmax(1))).sum(1)[images].mean()

    share = errs.double().mean()
    consistency = (student['perturbed'].softmax(1) - student['clean'].softmax(1)).square().mean()
    expected = share * divergence('clean', errs) + (1 - share) * divergence('perturbed', ~errs)
    assert 0 < share < 1
    torch.testing.assert_close(dgad_loss(student, teacher, target, beta=0.0), expected)
    torch.testing.assert_close(dgad_loss(student, teacher, target), expected + consistency)


def test_igdm_knows_changes_alone():
    student, teacher = views('perturbed', 'mirrored'), views('perturbed', 'mirrored', seed=1)
    loss = igdm_loss(student, teacher)
    assert loss > 0.1 and igdm_loss(student, student).abs() < 1e-12
    moved = {view: logits + torch.arange(5) for view, logits in student.items()}
    torch.testing.assert_close(igdm_loss(moved, teacher), loss)
    labels = (teacher['perturbed'] - teacher['mirrored']).softmax(1)
    expected = labels * (labels.log() - (student['perturbed'] - student['mirrored']).log_softmax(1))
    torch.testing.assert_close(loss, expected.sum(1).mean())


def test_adaad_is_the_divergence_on_perturbed_images():
    student, teacher = views('perturbed'), views('perturbed', seed=1)
    labels = teacher['perturbed'].softmax(1)
    expected = (labels * (labels.log() - student['perturbed'].log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(adaad_loss(student, teacher), expected)


@pytest.mark.parametrize('name', ADVERSARIAL_LOSSES)
def test_teachers_get_no_gradient(name):
    teacher = {
        view: logits.requires_grad_() for view, logits in views('clean', 'perturbed', 'mirrored', seed=1).items()
    }
    learner = {view: logits.requires_grad_() for view, logits in everything().items()}
    rest = [torch.arange(40) % 5] if name == 'dgad' else []
    ADVERSARIAL_LOSSES[name](learner, teacher, *rest).backward()
    assert all(logits.grad is None for logits in teacher.values())
    assert learner['perturbed'].grad.abs().sum() > 0


# -- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_a_perturbation_stays_in_the_ball_and_in_0_to_1(kind):
    model = student().eval()
    images, target = batch()
    attack = create_attack(model, eps=0.1, **kind)
    found = attack(cross_entropy(model, target), images)
    black, white = (torch.tensor((value - 0.5) / 0.25) for value in (0.0, 1.0))
    assert found.min() >= black and found.max() <= white  # exactly
    # The bounds are float32, an ulp of a normalised pixel from what they are in float64.
    assert (found.double() - images.double()).abs().max() <= 0.1 / 0.25 + 2**-22
    assert (found - images).abs().max() > 0.39
    assert (images == black).any() and (images == white).any()  # what the bounds are for


def test_without_normalisation_bounds_are_exact():
    model = student().eval()
    images = batch()[0] * 0.25 + 0.5
    found = Attack('pgd', (0.0,), (1.0,), eps=8 / 255)(cross_entropy(model, torch.zeros(6, dtype=torch.long)), images)
    assert found.min() >= 0 and found.max() <= 1
    assert (found <= images + 8 / 255).all() and (found >= images - 8 / 255).all()


def test_each_channel_has_its_own_ball_and_a_pixel_outside_0_to_1_moves_inwards_alone():
    images = torch.zeros(1, 2, 1, 3)
    images[0, 0] = torch.tensor([-9.0, 9.0, 0.0])
    attack = Attack('fgsm', (0.5, 0.4), (0.25, 0.5), eps=0.1)
    up = attack(lambda x: x.sum(), images)
    torch.testing.assert_close(
        up - images, torch.tensor([[[0.4, 0.0, 0.4]], [[0.2, 0.2, 0.2]]])[None], atol=1e-6, rtol=0
    )
    down = attack(lambda x: -x.sum(), images)
    torch.testing.assert_close(
        images - down, torch.tensor([[[0.0, 0.4, 0.4]], [[0.2, 0.2, 0.2]]])[None], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize('kind', KINDS[:2])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_efficientnet', 'test_convnext'])
def test_the_loss_on_perturbed_images_is_at_least_that_on_clean_ones(name, kind):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    size = model.pretrained_cfg['input_size'][-1] if name == 'test_vit' else 64
    pixels, target = torch.rand(4, 3, size, size), torch.arange(4)
    attack = create_attack(model, eps=1 / 255, step=0.25 / 255, **{k: v for k, v in kind.items() if k != 'step'})
    images = attack.normalize(pixels)
    objective = cross_entropy(model, target)
    assert objective(attack(objective, images)) >= objective(images)


def test_of_a_linear_model_every_single_loss_grows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3)).eval()
    images, target = batch(size=30, low=0.3, high=0.7)
    for kind in KINDS:
        found = Attack(eps=0.02, **{**kind, **GREY})(cross_entropy(model, target % 3), images)
        clean, perturbed = (F.cross_entropy(model(x), target % 3, reduction='none') for x in (images, found))
        assert (perturbed > clean).all()


def test_random_numbers_are_torchs():
    model, (images, target) = student().eval(), batch()
    attack = create_attack(model, steps=1)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(attack(cross_entropy(model, target), images))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# -- tasks ------------------------------------------------------------------------------------------------------------


TASKS = {
    'plain': lambda: ClassificationTask(student(), criterion=nn.CrossEntropyLoss(), verbose=False),
    'gpd': lambda: GapPreservingTask(student(), num_branches=2, verbose=False),
    'gpd by dgad': lambda: GapPreservingTask(student(), gpd_loss='dgad', verbose=False),
    'gpd by igdm': lambda: GapPreservingTask(student(), gpd_loss='igdm', verbose=False),
    'static': lambda: DistillationTask(student(), student(3), distill_type='adaad,igdm', verbose=False),
    'both': lambda: GapPreservingTask(student(), student(3), distill_type='dgad', verbose=False),
    'several': lambda: DistillationTask(
        student(), [student(3), student(4)], distill_type='dgad,igdm@2,kd', verbose=False
    ),
}


@functools.lru_cache(None)
def made(name):
    return TASKS[name]().train()


def plain_task(name):
    return copy.deepcopy(made(name))


def make_task(name):
    task = plain_task(name)
    setup_adversary(task, create_attack(student(), steps=2))
    return task


def adversary_of(task):
    (hook,) = [hook for hook in pre_hooks_of(task) if isinstance(hook, Adversary)]
    return hook


@pytest.mark.parametrize('name', TASKS)
def test_a_task_trains_on_perturbed_images_and_the_attack_leaves_no_trace(name):
    task, (images, target) = make_task(name), batch()
    before = {key: tensor.clone() for key, tensor in task.state_dict().items()}
    torch.manual_seed(7)
    perturbed = adversary_of(task).perturb(task, images, target)
    assert all(torch.equal(before[key], tensor) for key, tensor in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    trained = task.get_trainable_module()
    assert all(module.training for module in trained.modules())
    torch.manual_seed(7)
    result = task(images, target)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    if name in ('plain', 'gpd'):  # the same task, which is handed the perturbed images, or the clean ones
        torch.testing.assert_close(plain_task(name)(perturbed, target)['loss'], result['loss'])
        assert not torch.allclose(plain_task(name)(images, target)['loss'], result['loss'])


def test_a_dynamic_teacher_that_is_the_student_teaches_nothing_by_igdm():
    task, (images, target) = make_task('gpd by igdm'), batch()
    assert task(images, target)['gpd_loss'].abs() < 1e-6
    with torch.no_grad():
        for parameter in task.get_dynamic_teacher().wide.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std().nan_to_num())
    assert task(images, target)['gpd_loss'] > 1e-5


def test_every_view_is_normalised_by_itself():
    """As in the code of the papers; batch norm records the views one after another."""
    task, (images, target) = make_task('gpd by dgad'), batch()
    torch.manual_seed(7)
    perturbed = adversary_of(task).perturb(task, images, target)
    alone = student().train()
    torch.manual_seed(7)
    result = task(images, target)
    for view, shown in (('clean', images), ('perturbed', perturbed)):
        torch.testing.assert_close(result[f'output_{view}'], alone(shown), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result[f'teacher_output_{view}'], result[f'output_{view}'], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result['output'], result['output_perturbed'])
    averages = task.get_student().state_dict()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(averages[key], value)


def test_terms_of_a_static_teacher_are_the_losses_of_views():
    task, static, (images, target) = make_task('both'), student(3).eval(), batch()
    torch.manual_seed(7)
    perturbed = adversary_of(task).perturb(task, images, target)
    torch.manual_seed(7)
    result = task(images, target)
    with torch.no_grad():
        teacher = dict(clean=static(images), perturbed=static(perturbed))
    for prefix in ('', 'teacher_'):
        learner = {view: result[f'{prefix}output_{view}'] for view in teacher}
        torch.testing.assert_close(result[f'{prefix}kd/dgad'], dgad_loss(learner, teacher, target))


def test_what_is_maximised():
    """The divergence from a static teacher, along both gradients; else the task loss."""
    images, target = batch()
    model, static = student().eval(), student(3).eval()

    def divergence(x):
        return F.kl_div(model(x).log_softmax(1), static(x).log_softmax(1), reduction='sum', log_target=True)

    for name in ('static', 'gpd by igdm'):
        task = make_task(name)
        hook = adversary_of(task)
        torch.manual_seed(7)
        found = hook.perturb(task, images, target)
        torch.manual_seed(7)
        expected = hook.attack(divergence if name == 'static' else cross_entropy(model, target), images)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize('name', ['both', 'gpd by igdm'])
def test_gradients_of_images_are_those_of_finite_differences(name):
    """Through attack and joint step, in float64. What teachers say of the images is a constant for who learns it."""
    original = make_task(name).double()
    images, target = batch(4, low=0.3, high=0.7)  # where the ball's bounds move with the image, and [0, 1] does not cut
    images = images.double()
    constants = {}

    def loss(x):
        task = copy.deepcopy(original)  # batch norm records what it sees
        real, static = task.gpd_loss.of_step, task.static_teacher

        def of_step(student, teacher, target):
            constants.setdefault('teacher', {key: value.detach() for key, value in teacher.items()})
            return real(student, constants['teacher'], target)

        task.gpd_loss.of_step = of_step
        if static is not None:
            forward = static.forward
            static.forward = lambda *args, **kwargs: constants.setdefault('static', forward(*args, **kwargs))
        torch.manual_seed(7)
        return task(x, target)['loss']

    wanted = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wanted), wanted)
    for seed in range(2):
        torch.manual_seed(seed)
        direction, step = torch.randn_like(images), 1e-6
        expected = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)


def test_a_copy_of_a_task_and_keywords_work():
    task, (images, target) = make_task('both'), batch()
    copied = copy.deepcopy(task)
    losses = []
    for one in (task, copied):
        torch.manual_seed(3)
        losses.append(one(target=target, input=images)['loss'])
    assert torch.equal(*losses)


def test_a_static_teacher_that_is_validated_sees_plain_batches():
    task, (images, _) = make_task('both'), batch()
    torch.testing.assert_close(task.teacher(images).logits, student(3).eval()(images))


@pytest.mark.usefixtures('may_change_settings')
def test_what_is_compiled_trains_alike():
    task, (images, target) = make_task('both'), batch()
    compiled = copy.deepcopy(task)
    compiled.compile(backend='eager')
    losses = []
    for one in (task, compiled):
        torch.manual_seed(3)
        losses.append(one(images, target)['loss'])
    torch.testing.assert_close(*losses)
