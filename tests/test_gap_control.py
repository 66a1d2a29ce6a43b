"""What keeps the dynamic teacher near its student: the switch of SwitOKD, as its formula says, at no backward pass."""

import copy
import math

import pytest
import timm
import torch

from conftest import TINY_RESNET
from programs import differences, summary, train
from steps import batch
from test_resume import kill_a_run
from timm_gpd import GapPreservingTask
from timm_gpd.errors import UsageError
from timm_gpd.task.gap_control import GapTarget, Switch
from timm_gpd.teacher import nested
from timm_gpd.training.args import parse_train_args

STORAGE = pytest.mark.parametrize(
    'storage',
    [
        {},
        {'scale': 'teacher', 'noise': 0.3},
        {'num_branches': 6, 'noise': 0.3},
        {'static_teacher': 'resnet', 'distill_type': 'dkd,reviewkd'},
    ],
    ids=['plain', 'teacher', 'branches', 'static'],
)


@pytest.fixture(autouse=True)
def plans_of_ratios_between_are_right(monkeypatch):
    """tests/test_nested.py checks them."""
    monkeypatch.setattr(nested, 'verify_plan', lambda student, plan: 0.0)


class Decided(Switch):
    """A switch whose decision is fixed."""

    def __init__(self, is_paused):
        super().__init__()
        self.is_paused = is_paused

    def decide(self, student, teacher, target):
        return {**super().decide(student, teacher, target), 'paused': student.new_tensor(float(self.is_paused))}


def make_task(gap_control=None, **kwargs):
    """A task whose dynamic teacher is some steps away from its student."""
    torch.manual_seed(0)
    if 'static_teacher' in kwargs:
        kwargs['static_teacher'] = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    task = GapPreservingTask(student, gap_control=gap_control, verbose=False, **kwargs).double().train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in task.get_dynamic_teacher().parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return task


def double_batch():
    x, target = batch()
    return x.double(), target


def gradients(task, loss):
    """By parameter name, with None where there is none."""
    parameters = dict(task.get_trainable_module().named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


# -- the switch -------------------------------------------------------------------------------------------------------


def decide_image_by_image(student, teacher, target):
    """The formula in numbers alone: distance, threshold, decision."""

    def probabilities(logits):
        powers = [math.exp(logit) for logit in logits]
        return [power / sum(powers) for power in powers]

    def distance(one, other):
        return sum(abs(a - b) for a, b in zip(one, other))

    rows = [
        (probabilities(s), probabilities(t), [float(c == y) for c in range(len(s))] if isinstance(y, int) else y)
        for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist())
    ]
    gap = sum(distance(s, t) for s, t, _ in rows) / len(rows)
    of_student = sum(distance(s, y) for s, _, y in rows) / len(rows)
    of_teacher = sum(distance(t, y) for _, t, y in rows) / len(rows)
    threshold = of_student - math.exp(-of_teacher / (of_student + of_teacher)) * of_teacher
    return gap, threshold, gap > threshold and of_teacher < of_student


@pytest.mark.parametrize('is_soft', [False, True])
def test_the_decision_is_that_of_the_formula(is_soft):
    """In all four cases: the gap below the threshold or above, the teacher better than the student or not."""
    generator = torch.Generator().manual_seed(0)
    cases = set()
    for sharpness in (0, 0.5, 1, 2, 4, 8):
        for lead in (-2, 0, 0.1, 0.5, 2, 8):
            student, noise = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
            target = torch.randint(5, (6,), generator=generator)
            teacher = student + sharpness * noise + lead * torch.nn.functional.one_hot(target, 5)
            if is_soft:
                target = torch.rand(6, 5, generator=generator, dtype=torch.float64).softmax(-1)
            gap, threshold, is_paused = decide_image_by_image(student, teacher, target)
            found = Switch().decide(student, teacher, target)
            assert found['distance'].item() == pytest.approx(gap, abs=1e-12)
            assert found['threshold'].item() == pytest.approx(threshold, abs=1e-12)
            assert found['paused'].item() == is_paused
            cases.add((gap > threshold, is_paused))
    assert {True, False} == {paused for _, paused in cases} and (is_soft or (True, False) in cases)


def test_what_is_learned_to_the_last_digit_is_no_reason_to_pause():
    logits = torch.tensor([[200.0, 0.0]])
    found = Switch().decide(logits.bfloat16(), logits.bfloat16(), torch.tensor([0]))
    assert {name: value.item() for name, value in found.items()} == {'distance': 0, 'threshold': 0, 'paused': 0}
    assert found['distance'].dtype == torch.float32


def test_what_is_not_finite_is_no_reason_to_pause():
    """The loss is infinite too, and the loop says so."""
    logits = torch.tensor([[float('nan'), 0.0]])
    assert Switch().decide(torch.zeros(1, 2), logits, torch.tensor([0]))['paused'] == 0


@STORAGE
def test_gradients_of_a_paused_step_are_those_of_the_students_loss_alone(storage):
    task = make_task(Decided(True), **storage)
    twin = copy.deepcopy(task)
    x, target = double_batch()
    result = task(x, target)
    learners, static_output = twin.get_learners(), None
    if twin.static_teacher is not None:
        static_output = twin.static_teacher(x)
    outputs = learners.run(x)
    student = learners.step_loss('student', outputs['student'], target, static_output)
    teacher = outputs['dynamic_teacher'].logits.detach()
    loss = student['loss'] + twin.gpd_weight * twin.gpd_loss(student['output'], teacher)
    torch.testing.assert_close(result['loss'], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result['teacher_output'].detach(), teacher)
    assert result['paused'] == 1 and result['teacher_task_loss'] > 0
    actual, expected = gradients(task, result['loss'] / 4), gradients(twin, loss / 4)
    assert all(gradient is not None for gradient in actual.values()), 'DDP waits for every gradient'
    for name, gradient in expected.items():
        gradient = torch.zeros_like(actual[name]) if gradient is None else gradient
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    # Of the stem's filters half are the student's; the other half is the dynamic teacher's alone.
    stem = actual['model.branches.conv1.0.kernel' if 'num_branches' in storage else 'model.wide.conv1.0.weight']
    assert stem[::2].any() and not stem[1::2].any()


@STORAGE
def test_a_step_that_is_not_paused_is_the_joint_one(storage):
    compare_with_joint_training(storage)


def test_a_step_that_is_not_paused_is_the_one_with_ratios_between():
    compare_with_joint_training({'method': 'sandwich', 'ratio': 3})


def compare_with_joint_training(kwargs):
    task, joint = make_task(Decided(False), **kwargs), make_task(**kwargs)
    results = [each(*double_batch()) for each in (task, joint)]
    assert set(results[0]) - set(results[1]) == {'distance', 'threshold', 'paused'}
    for name in results[1]:
        assert torch.equal(results[0][name], results[1][name]), name
    actual, expected = (gradients(each, result['loss']) for each, result in zip((task, joint), results))
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    for name, buffer in joint.get_dynamic_teacher().named_buffers():
        assert torch.equal(buffer, dict(task.get_dynamic_teacher().named_buffers())[name]), name


def test_ratios_between_learn_on_in_a_paused_step():
    kwargs = dict(method='sandwich', ratio=3, between=1)
    task, twin = make_task(Decided(True), **kwargs), make_task(**kwargs)
    x, target = double_batch()
    result = task(x, target)
    teacher = twin.get_dynamic_teacher()
    logits = teacher(x).detach()
    student = teacher.forward_student(x)
    loss = twin.criterion(student, target) + twin.gpd_weight * twin.gpd_loss(student, logits)
    loss = loss + twin.gpd_loss(teacher.at_ratio(2)(x), logits)
    torch.testing.assert_close(result['loss'], loss, rtol=1e-12, atol=0)
    actual, expected = gradients(task, result['loss']), gradients(twin, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize('precision', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('is_paused', [False, True])
def test_a_paused_step_has_no_backward_pass_of_the_dynamic_teacher(is_paused, precision):
    """Also in float16, where a backward pass waits for the scale of its gradients."""
    task = make_task(Decided(is_paused)).float()
    passes = []
    for name in ('student', 'wide'):
        getattr(task.get_dynamic_teacher(), name).layer1.register_forward_hook(
            lambda module, inputs, output, name=name: output.register_hook(lambda _: passes.append(name)) and None
        )
    with torch.autocast('cpu', precision, enabled=precision is not None):
        result = task(*batch())
    result['loss'].backward()
    assert passes.count('student') == 1 and passes.count('wide') == (not is_paused)


def test_a_dynamic_teacher_starts_without_a_gap():
    student = timm.create_model('test_resnet', **TINY_RESNET)
    result = GapPreservingTask(student, gap_control=Switch(), verbose=False).train()(*batch())
    assert result['distance'] < 1e-5 and result['paused'] == 0


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(gap_control='switch'), "gap_control must be a Switch or a GapTarget, but is 'switch'"),
        (dict(gap_control=Switch(), method='netaug'), 'another wider model each time, whose gap is none to control'),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_task(**kwargs)


def test_a_switch_needs_classes():
    student = timm.create_model('test_resnet', num_classes=1)
    with pytest.raises(ValueError, match='the student has one: take a GapTarget'):
        GapPreservingTask(student, gpd_loss='mse', gap_control=Switch(), verbose=False)


def test_a_compiler_is_refused_where_every_step_decides():
    with pytest.raises(ValueError, match='which a compiler cannot follow: leave out compile'):
        make_task(Switch()).compile(backend='eager')


# -- the target -------------------------------------------------------------------------------------------------------


def observe(control, *leads):
    """Tells a control the leads of some batches, of a student whose loss is 2; what it logs of the last."""
    for lead in leads:
        losses = (torch.tensor(2.0), torch.tensor(2.0 - lead))
        terms = [{'task_loss': loss, 'output': torch.zeros(4, 3)} for loss in losses]
        logged = control.observe(*terms)
    return logged


@pytest.mark.parametrize('scales', ['teacher', 'distillation'])
def test_average_and_factor_follow_the_formula(scales):
    control = GapTarget(0.25, scales)
    average = exponent = 0.0
    generator = torch.Generator().manual_seed(0)
    exponents = []
    for lead in (torch.randn(400, generator=generator) * 0.2 + torch.linspace(1, -0.5, 400)).tolist():
        before = control.factor().item()
        assert observe(control, lead)['gap_factor'] == before, 'a step has the factor that those before it have left'
        average += 0.02 * (lead - average)
        move = 0.02 * min(1, max(-1, average / 0.25 - 1))
        exponent = min(0, max(-5, exponent - move)) if scales == 'teacher' else min(5, max(-5, exponent + move))
        exponents.append(exponent)
        assert control.average.item() == pytest.approx(average, abs=1e-5)
        assert control.factor().item() == pytest.approx(2**exponent, rel=1e-4)
    assert min(exponents) < -1 if scales == 'teacher' else max(exponents) > 1


@pytest.mark.parametrize('scales, large, small', [('teacher', 2**-5, 1), ('distillation', 2**5, 2**-5)])
def test_a_lead_off_the_target_moves_the_factor_against_it_and_not_for_ever(scales, large, small):
    control = GapTarget(0.5, scales)
    observe(control, *[0.5] * 2000)
    start = control.factor().item()
    observe(control, *[1.0] * 50)
    assert control.factor() < start if scales == 'teacher' else control.factor() > start
    observe(control, *[3.0] * 700)
    assert control.factor() == large
    observe(control, *[0.0] * 1000)
    assert control.factor() == small


def test_a_lead_that_is_not_finite_leaves_no_trace():
    control, twin = GapTarget(0.5), GapTarget(0.5)
    observe(control, 2.0, float('nan'), float('inf'), 3.0)
    observe(twin, 2.0, 3.0)
    assert control.average == twin.average and control.exponent == twin.exponent


@pytest.mark.parametrize('scales', ['teacher', 'distillation'])
@pytest.mark.parametrize('method', ['joint', 'sandwich'])
def test_the_factor_is_of_the_loss_that_it_says(scales, method):
    control = GapTarget(0.5, scales)
    control.exponent.fill_(-2)
    task = make_task(control, method=method, ratio=3, noise=0.0)
    twin = make_task(method=method, ratio=3, noise=0.0)
    x, target = double_batch()
    result = task(x, target)
    teacher = twin.get_dynamic_teacher()
    student, logits = teacher.joint(x)
    of_teacher, distillation = (0.25, 1) if scales == 'teacher' else (1, 0.25)
    loss = twin.criterion(student, target) + of_teacher * twin.criterion(logits, target)
    loss = loss + distillation * twin.gpd_weight * twin.gpd_loss(student, logits)
    if method == 'sandwich':
        loss = loss + twin.gpd_loss(teacher.at_ratio(2)(x), logits.detach())
    torch.testing.assert_close(result['loss'], loss, rtol=1e-12, atol=0)
    assert result['gap_factor'] == 0.25
    assert result['lead'] == result['task_loss'].detach() - result['teacher_task_loss'].detach()
    actual, expected = gradients(task, result['loss']), gradients(twin, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_checkpoint_holds_average_and_factor():
    task, twin = make_task(GapTarget(0.5)), make_task(GapTarget(0.5))
    observe(task.gap_control, *[3.0] * 60)
    twin.load_checkpoint_state(**task.get_checkpoint_state())
    assert twin.gap_control.average == task.gap_control.average > 0
    assert twin.gap_control.factor() == task.gap_control.factor() < 1
    # Those of runs without it know nothing of it, and the other way round.
    assert 'gap_control' not in make_task().get_task_state()
    make_task().load_task_state(task.get_task_state())
    with pytest.raises(ValueError, match='the checkpoint holds no gap_control, which this run has'):
        task.load_task_state(make_task().get_task_state())


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((0.0,), 'gap target must be above 0, but is 0.0'),
        ((float('nan'),), 'gap target must be'),
        ((1.0, 'student'), "scales one of teacher, distillation, but not 'student'"),
    ],
)
def test_targets_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GapTarget(*arguments)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--gpd-switch --gpd-gap-target 1', '--gpd-switch and --gpd-gap-target control the same gap: give one of them'),
        ('--gpd-switch --gpd-method netaug', '--gpd-switch controls a gap, and --gpd-method netaug has none'),
        ('--gpd-gap-target 1 --gpd-method netaug', '--gpd-gap-target controls a gap'),
        ('--gpd-switch --torchcompile', 'leave out --torchcompile'),
        ('--gpd-switch --task multilabel --gpd-loss mse', 'take --gpd-gap-target'),
        ('--gpd-gap-target 1 --gpd-gap-scales distillation --gpd-weight 0', 'which is 0: raise it'),
    ],
)
def test_flags_that_contradict_each_other_are_refused_in_one_line(flags, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_train_args(['--data-dir', 'x', '--gpd', *flags.split()])
    assert '\n' not in str(error.value)


FLAGS = ['--gpd-gap-target', '0.1', '--gpd-gap-scales', 'distillation', '-b', '20', '--recovery-interval', '2']


def test_a_run_that_was_killed_goes_on_with_its_factor(tmp_path):
    train(tmp_path / 'whole', *FLAGS, '--experiment', 'run')
    arguments = [*FLAGS, '--experiment', 'run', '--resume', 'auto']
    kill_a_run(tmp_path / 'killed', arguments, update=8, save=0)
    train(tmp_path / 'killed', *arguments)
    assert differences(tmp_path / 'killed' / 'run', tmp_path / 'whole' / 'run') == []
    rows = summary(tmp_path / 'whole' / 'run')
    assert float(rows[1]['train_gap_factor']) < float(rows[0]['train_gap_factor']) < 1
    assert float(rows[1]['train_lead']) == pytest.approx(
        float(rows[1]['train_task_loss']) - float(rows[1]['train_teacher_task_loss']), abs=1e-5
    )


def test_a_run_logs_the_share_of_paused_steps(tmp_path):
    train(tmp_path, '--gpd-switch', '--epochs', '1', '--experiment', 'run', '--grad-accum-steps', '2')
    (row,) = summary(tmp_path / 'run')
    assert float(row['train_paused']) == 0 < float(row['train_distance']) < float(row['train_threshold'])
