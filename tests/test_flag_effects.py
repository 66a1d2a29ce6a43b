"""What flags of timm's that came with its newer scripts do, with a dynamic teacher and without."""

import json
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from timm.layers import SplitBatchNorm2d, is_fast_norm
from timm.loss import LOSS_TYPES, MULTI_LABEL_LOSS_TYPES
from timm.task import ClassificationTask, MultiLabelClassificationTask

from programs import summary, train
from timm_gpd.distillers import DISTILLERS
from timm_gpd.errors import UsageError
from timm_gpd.losses import GPD_LOSSES, needs_target
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.args.schedule import DECAY_FNS, SCHEDULES
from timm_gpd.training.checkpoints import Position
from timm_gpd.training.compute import create_compute, fast_norm, import_device_modules
from timm_gpd.training.criterion import create_criterion
from timm_gpd.training.data.datasets import resolve_data
from timm_gpd.training.data.loaders import create_train_loader, mean_batch_size
from timm_gpd.training.data.posterize import posterize_to_black
from timm_gpd.training.loop import LoopSettings, TrainingLoop
from timm_gpd.training.optimizer import create_optimizer, resolve_lr
from timm_gpd.training.processes import Processes
from timm_gpd.training.schedule import create_schedule
from timm_gpd.training.student import check_image_sizes, create_student, resolve_input
from timm_gpd.training.task import MULTILABEL_DISTILLERS, MULTILABEL_GPD_LOSSES, create_task, get_student

CPU = torch.device('cpu')
VIT = ['--model', 'test_vit', '--model-kwargs', 'img_size=64']
SMALL = '--model test_resnet --num-classes 3 --in-chans 1 --img-size 32 --device cpu --workers 0 --lr 0.1'.split()


def arguments(*extra):
    return parse_train_args([*SMALL, *map(str, extra)])


def make_task(*extra):
    torch.manual_seed(0)
    args = arguments(*extra)
    return args, create_task(args, create_student(args), CPU)


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gpd', [False, True])
@pytest.mark.parametrize('loss', sorted(set(LOSS_TYPES) - {'jsd', 'twoway', 'zlpr', 'db'}))
def test_losses_of_one_class(loss, gpd):
    _, task = make_task('--loss', loss, *(['--gpd'] if gpd else []))
    target = torch.tensor([0, 2, 1, 2])
    result = task(torch.randn(4, 1, 32, 32), target)
    logits = result['output'].detach()
    smooth = F.one_hot(target, 3) * 0.9 + 0.1 / 3
    probabilities, log_probabilities = logits.softmax(1), logits.log_softmax(1)
    cross_entropy = -(smooth * log_probabilities).sum(1)
    chosen = F.one_hot(target, 3)
    expected = {
        'ce': cross_entropy,
        'bce': F.binary_cross_entropy_with_logits(logits, smooth, reduction='none').mean(1),
        'poly': cross_entropy + 2 * (1 - (smooth * probabilities).sum(1)),
        # Of the class and of the others, weighted by how wrong they are, with exponents 1 and 4.
        'asl': -(smooth * log_probabilities * torch.where(chosen > 0, 1 - probabilities, probabilities**4)).sum(1),
    }[loss]
    assert result['task_loss' if gpd else 'loss'].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in task.get_trainable_module().parameters())


def test_weights_of_classes_come_from_their_counts(tmp_path):
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[1, 2, 4], num_samples=8)))
    given = ['--task', 'multilabel', '--class-stats', stats]
    logits, target = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    pos, negative = F.logsigmoid(logits) * target, F.logsigmoid(-logits) * (1 - target)

    criterion = create_criterion(arguments(*given, '--loss-pos-weight', 'neg_pos', '--loss-weight-power', '0.5'), 3)
    weight = torch.tensor([7.0, 3.0, 1.0]).sqrt()
    torch.testing.assert_close(criterion(logits, target), -(pos * weight + negative).mean())

    criterion = create_criterion(arguments(*given, '--loss-class-weight', 'inv_freq', '--loss-weight-max', '1'), 3)
    weight = torch.tensor([8.0, 4.0, 2.0])
    weight = (weight / weight.mean()).clamp(max=1)
    torch.testing.assert_close(criterion(logits, target), -((pos + negative) * weight).mean())

    with pytest.raises(UsageError, match='are of 3 classes and the model has 4'):
        create_criterion(arguments(*given, '--loss', 'db'), 4)


@pytest.mark.parametrize('loss', MULTI_LABEL_LOSS_TYPES)
def test_losses_of_several_classes(loss, tmp_path):
    """A step lowers the loss of student and dynamic teacher, and of the student alone."""
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[1, 2, 4], num_samples=8)))
    common = ['--task', 'multilabel', '--loss', loss, *(['--class-stats', stats] if loss == 'db' else [])]
    torch.manual_seed(1)
    images, target = torch.randn(4, 1, 32, 32), torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).float()
    for extra, terms in (([], ['loss']), (['--gpd', '--gpd-loss', 'mse'], ['task_loss', 'teacher_task_loss'])):
        args, task = make_task(*common, *extra)
        assert extra or isinstance(task, MultiLabelClassificationTask)
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
        before = task(images, target)
        before['loss'].backward()
        optimizer.step()
        after = task(images, target)
        assert all(after[name] < before[name] for name in terms)


def test_losses_of_several_classes_do_not_compare_probabilities_of_exclusive_ones():
    """Those compare softmax outputs, which do not change when all logits of an image do by the same."""
    student, teacher = torch.randn(2, 5, 4)
    shift = torch.randn(5, 1)
    for name, loss in GPD_LOSSES.items():
        rest = [torch.arange(5) % 4] if needs_target(loss) else []
        exclusive = torch.allclose(loss(student + shift, teacher, *rest), loss(student, teacher, *rest), atol=1e-5)
        assert exclusive == (name not in MULTILABEL_GPD_LOSSES)
    assert set(MULTILABEL_DISTILLERS) < DISTILLERS.keys()


# -- batches ----------------------------------------------------------------------------------------------------------


def digits_loader(tmp_path, *extra):
    args = parse_train_args(
        ['-c', 'configs/digits.yaml', '--data-dir', str(tmp_path.parent / 'data'), '--digits-train-size', '100', *extra]
    )
    config = resolve_input(args, create_student(args))
    return args, create_train_loader(args, resolve_data(args), config, 10, CPU)[0]


def test_a_batch_of_splits_is_one_view_after_the_other(tmp_path):
    still = ['--scale', '1', '1', '--ratio', '1', '1']
    args, loader = digits_loader(tmp_path, '--aug-splits', '3', '--jsd-loss', '--aa', 'rand-m9-inc1', *still)
    images, target = next(iter(loader))
    assert images.shape == (150, 1, 32, 32) and target.shape == (150,)
    clean, *views = images.split(50)
    assert all(torch.equal(part, target[:50]) for part in target.split(50))
    # The views are of the clean images, which are in the data set as they are.
    for view in views:
        assert not torch.equal(view, clean)
    _, plain = digits_loader(tmp_path, '--no-aug')
    known = {image.numpy().tobytes() for batch, _ in plain for image in batch}
    assert {image.numpy().tobytes() for image in clean} <= known


def test_the_loss_of_splits_is_that_of_clean_images_and_of_how_views_differ():
    _, task = make_task('--aug-splits', '3', '--jsd-loss', '--smoothing', '0', '--gpd')
    result = task(torch.randn(6, 1, 32, 32), torch.tensor([0, 2] * 3))
    probabilities = torch.stack(result['output'].softmax(1).split(2))
    mixture = probabilities.mean(0).log()
    divergence = sum(F.kl_div(mixture, part, reduction='batchmean') for part in probabilities) / 3
    expected = -probabilities[0, [0, 1], [0, 2]].log().mean() + 12 * divergence
    assert result['task_loss'].item() == pytest.approx(expected.item(), rel=1e-4)


def test_sizes_change_between_batches_and_the_learning_rate_is_of_their_mean(tmp_path):
    sizes = ['--train-img-sizes', '24', '32', '--train-batch-sizes', '20', '10', '--train-size-probs', '1', '3']
    args, loader = digits_loader(tmp_path, *sizes, '--train-batches-per-epoch', '12')
    shapes = {tuple(images.shape) for images, _ in loader}
    assert shapes == {(20, 1, 24, 24), (10, 1, 32, 32)} and len(loader) == 12
    assert mean_batch_size(args, loader) == pytest.approx(12.5)
    args = parse_train_args(['--lr-base', '0.256', '--grad-accum-steps', '2'])
    assert resolve_lr(args, 12.5 * 2) == pytest.approx(0.025)
    with pytest.raises(UsageError, match='takes no images of 24 pixels: check --train-img-sizes'):
        check_image_sizes(arguments(*sizes[:3]), timm.create_model('test_vit', in_chans=1), 1)


def test_posterizing_to_no_bits_is_black():
    before = dict(NAME_TO_OP)
    with posterize_to_black():
        policy = rand_augment_transform('rand-m10-n1-inc1', {}, transforms={'PosterizeIncreasing': 1.0})
    assert NAME_TO_OP == before
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    policy.ops[0].prob = 1.0
    assert policy(image).tobytes() == bytes(4 * 4 * 3)
    policy.ops[0].magnitude = 5  # two bits
    assert policy(image).getpixel((0, 0)) == (192, 64, 0)


# -- models -----------------------------------------------------------------------------------------------------------


def test_the_head_starts_as_told():
    torch.manual_seed(0)
    plain = create_student(arguments())
    torch.manual_seed(0)
    scaled = create_student(arguments('--head-init-scale', 0.5, '--head-init-bias', -2))
    torch.testing.assert_close(scaled.fc.weight, plain.fc.weight * 0.5)
    assert (scaled.fc.bias == -2).all() and torch.equal(scaled.conv1[0].weight, plain.conv1[0].weight)


def test_an_overlay_is_over_the_models_own_values(tmp_path):
    args = arguments('--pretrained-cfg-overlay', 'crop_pct=0.5', 'interpolation=bilinear')
    config = resolve_input(args, create_student(args))
    assert config.crop_pct == 0.5 and config.interpolation == 'bilinear'
    torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path / 'weights.pth')
    args = parse_train_args(
        ['--model', 'test_resnet', '--num-classes', '7', '--pretrained-path', str(tmp_path / 'weights.pth')]
        + ['--pretrained-cfg-overlay', 'crop_pct=0.5']
    )
    student = create_student(args)
    assert student.pretrained_cfg['crop_pct'] == 0.5
    assert torch.equal(student.conv1[0].weight, torch.load(tmp_path / 'weights.pth')['conv1.0.weight'])


def test_split_statistics_stay_in_training():
    args, task = make_task('--aug-splits', '2', '--split-bn', '--jsd-loss')
    trained = task.get_trainable_module()
    assert any(isinstance(module, SplitBatchNorm2d) for module in trained.modules())
    task(torch.randn(4, 1, 32, 32) + torch.tensor([0.0, 0, 5, 5]).view(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]))
    student, images = get_student(task), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(student(images), trained.eval()(images))
    plain = timm.create_model('test_resnet', num_classes=3, in_chans=1)
    plain.load_state_dict(student.state_dict())
    torch.testing.assert_close(plain.eval()(images), student(images))


@pytest.mark.parametrize(
    'device',
    ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))],
)
@pytest.mark.parametrize('kind', ['plain', 'gpd', 'static teacher'])
@pytest.mark.parametrize(
    'extra, tolerance',
    [
        (['--model-dtype', 'bfloat16'], 0.05),
        (['--amp', '--amp-dtype', 'bfloat16', '--fast-norm'], 0.02),
        (['--amp'], 5e-3),
        (['--grad-checkpointing'], 1e-6),
        (['--fast-norm'], 1e-6),
        (['--channels-last'], 1e-4),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_precision_changes_steps_by_its_rounding_only(extra, tolerance, kind, device, tmp_path):
    flags = [] if kind == 'plain' else ['--gpd']
    if kind == 'static teacher':
        torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=1).state_dict(), tmp_path / 'teacher.pth')
        flags += ['--kd-model-name', 'test_resnet', '--kd-model-path', tmp_path / 'teacher.pth']
        flags += ['--kd-distill-type', 'dkd,feature']

    def losses(*extra):
        torch.manual_seed(0)
        args = arguments(*VIT, *flags, *extra)
        compute = create_compute(device, args.amp, args.amp_dtype, args.channels_last, args.model_dtype)
        with fast_norm(args.fast_norm):
            student = create_student(args)
            compute.place(student)
            task = create_task(args, student, compute.device)
            optimizer = create_optimizer(args, task)
            if compute.loss_scaler is not None:  # no gradient overflows, which would skip a step
                compute.loss_scaler.load_state_dict({**compute.loss_scaler.state_dict(), 'scale': 256.0})
            torch.manual_seed(1)
            for _ in range(2):
                images, target = compute.prepare(torch.randn(4, 1, 64, 64), torch.tensor([0, 1, 2, 0]))
                with compute.autocast():
                    loss = task(images, target)['loss']
                yield loss.item()
                optimizer.zero_grad()
                if compute.loss_scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    compute.loss_scaler(loss, optimizer)

    assert list(losses(*extra)) == pytest.approx(list(losses()), rel=tolerance)
    assert not is_fast_norm()


def test_half_precision_is_of_weights_or_of_computing():
    with pytest.raises(UsageError, match='--amp keeps weights in float32'):
        create_compute('cpu', amp=True, model_dtype='bfloat16')
    images, target = create_compute('cpu', model_dtype='bfloat16').prepare(torch.zeros(2, 1, 4, 4), torch.ones(2))
    assert images.dtype == torch.bfloat16 and target.dtype == torch.float32


def test_device_modules_are_imported():
    import_device_modules(['json', 'csv'])
    with pytest.raises(UsageError, match="No module named 'no_such_device': check --device-modules"):
        import_device_modules(['no_such_device'])


# -- optimizer and schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gpd', [False, True])
def test_layers_decay_from_the_head_down(gpd):
    common = ['--opt', 'adamw', '--opt-kwargs', 'foreach=False', '--layer-decay', '0.5', *(['--gpd'] if gpd else [])]

    def scales(*extra):
        args, task = make_task(*common, *extra)
        optimizer = create_optimizer(args, task)
        assert optimizer.defaults['foreach'] is False
        scale = {parameter: group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
        named = task.get_trainable_module().named_parameters()
        return task, {name.removeprefix('model.wide.'): scale.get(parameter) for name, parameter in named}

    _, found = scales()
    assert found['fc.weight'] == 1.0 and found['conv1.0.weight'] == 0.5**5
    assert set(found.values()) == {0.5**layer for layer in range(6)}
    _, found = scales('--layer-decay-min-scale', '0.2')
    assert found['conv1.0.weight'] == 0.2 and found['fc.weight'] == 1.0
    task, found = scales('--layer-decay-no-opt-scale', '0.2')
    frozen = {name for name, scale in found.items() if scale is None}
    assert 'conv1.0.weight' in frozen and set(found.values()) == {None, 0.25, 0.5, 1.0}
    task(torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
    for name, parameter in task.get_trainable_module().named_parameters():
        assert (parameter.grad is None) == (name.removeprefix('model.wide.') in frozen)


def rates(*extra, epochs=10, updates=4):
    args = parse_train_args(['--epochs', str(epochs), '--warmup-epochs', '0', *extra])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, num_epochs = create_schedule(args, optimizer, updates, 0, lower_is_better=False)
    found = []
    for epoch in range(num_epochs):
        found.append(optimizer.param_groups[0]['lr'])
        if scheduler is not None:
            scheduler.step(epoch + 1, 0.0)
    return found


@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_is_one(name):
    found = rates('--sched', name, '--decay-milestones', '5', '--lr-stable-timescale', '2')
    assert len(found) == 10 and found[0] == pytest.approx(1.0) and all(math.isfinite(rate) for rate in found)
    assert (found[-1] < 1.0) == (name not in ('none', 'constant', 'step', 'plateau'))


def test_a_run_stops_within_its_schedule():
    assert len(rates('--stop-epoch', '12', '--cooldown-epochs', '2')) == 12
    with pytest.raises(UsageError, match='--stop-epoch 11 is behind the 10 epochs'):
        rates('--stop-epoch', '11')


def test_milestones_are_validated_whatever_the_interval(tmp_path):
    flags = ['--epochs', '3', '--val-interval', '3', '--save-epochs', '1', '--stop-epoch', '2']
    train(tmp_path, *flags, '--experiment', 'run', config='digits')
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1']
    assert sorted(path.name for path in (tmp_path / 'run').glob('milestone-*')) == ['milestone-1.pth.tar']


def test_wsd_is_steady_and_then_decays():
    found = rates('--sched', 'wsd')
    assert found[:9] == pytest.approx([1.0] * 9) and found[9] == pytest.approx(1 - math.sqrt(0.5))
    found = rates('--sched', 'wsd', '--decay-epochs', '4', '--lr-decay-fn', 'linear')
    assert found[6:] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    found = rates('--sched', 'rsqrt', '--lr-stable-timescale', '3', '--decay-epochs', '1')
    assert found[3] == pytest.approx(0.5**0.5)
    assert all(len(rates('--sched', 'wsd', '--lr-decay-fn', name)) == 10 for name in DECAY_FNS)
    with pytest.raises(UsageError, match='raise --epochs'):
        rates('--sched', 'wsd', '--decay-epochs', '11')


# -- the loop ---------------------------------------------------------------------------------------------------------


class _Batches:
    """Two batches of different sizes, as a loop asks for them."""

    def __init__(self):
        self.batches = [(torch.randn(size, 1, 4, 4), torch.randint(3, (size,))) for size in (2, 6)]

    def __len__(self):
        return len(self.batches)

    def run_epoch(self, *position):
        yield from enumerate(self.batches)


@pytest.mark.parametrize('how, power', [('none', 0), ('sqrt', 0.5), ('linear', 1)])
def test_the_loss_grows_with_its_batch(how, power):
    model, batches = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), _Batches()
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients, step = [], optimizer.step
    optimizer.step = lambda: (gradients.append([p.grad.clone() for p in model.parameters()]), step())
    loop = TrainingLoop(
        ClassificationTask(model, verbose=False),
        batches,
        optimizer,
        create_compute('cpu'),
        Processes(CPU),
        LoopSettings(variable_batch_loss_scale=how),
        batch_size=4.0,
    )
    metrics = loop.train_epoch(Position())
    losses = []
    for images, target in batches.batches:
        model.load_state_dict(dict(zip(model.state_dict(), expected)))
        loss = F.cross_entropy(model(images), target)
        losses.append(loss.item())
        found = torch.autograd.grad(loss, list(model.parameters()))
        scaled = [gradient * (len(target) / 4) ** power for gradient in found]
        torch.testing.assert_close(gradients.pop(0), scaled)
        expected = [value - 0.1 * gradient for value, gradient in zip(expected, scaled)]
    assert metrics['loss'] == pytest.approx((2 * losses[0] + 6 * losses[1]) / 8)  # the log is of plain losses


def test_without_a_split_to_validate_on_the_loss_of_training_counts(tmp_path):
    result = train(tmp_path, '--val-split', '', '--experiment', 'run')
    rows = summary(tmp_path / 'run')
    assert not any(name.startswith('eval_') for name in rows[0]) and len(rows) == 2
    best = min(range(2), key=lambda epoch: float(rows[epoch]['train_loss']))
    assert torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=False)['epoch'] == best
    assert 'validation' not in json.loads(result.stdout.split('--result\n')[1])[0]
    assert timm.create_model(f'local-dir:{tmp_path}/run/student', pretrained=True).num_classes == 10


def test_images_are_saved_and_an_average_on_the_cpu_is_not_validated(tmp_path):
    for name, flags in (
        ('plain', ['--save-images', '--synchronize-step', '--log-interval', '1']),
        ('average', ['--model-ema', '--model-ema-force-cpu', '--use-multi-epochs-loader']),
    ):
        train(tmp_path, '--epochs', '1', '--experiment', name, *flags, config='digits')
    assert Image.open(tmp_path / 'plain' / 'train-batch-1.jpg').size == (8 * 32, 7 * 32)  # 50 images, 8 in a row
    plain, average = (summary(tmp_path / name)[0] for name in ('plain', 'average'))
    assert plain['eval_loss'] == average['eval_loss']
    assert 'state_dict_ema' in torch.load(tmp_path / 'average' / 'last.pth.tar', weights_only=False)
    assert not (tmp_path / 'average' / 'train-batch-0.jpg').exists()
