"""The paper's ImageNet recipes: what their files say, and two steps of each on random images."""

import glob
import os

import pytest
import timm
import torch

from steps import train_epoch
from timm_gpd.teacher import inverse_reparameterization
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.compute import Compute
from timm_gpd.training.loop import LoopSettings
from timm_gpd.training.optimizer import create_optimizer
from timm_gpd.training.student import create_student, resolve_input, set_input
from timm_gpd.training.task import create_task

pytestmark = pytest.mark.usefixtures('memory_is_kept')

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs', 'imagenet')
CONFIGS = sorted(os.path.basename(path)[: -len('.yaml')] for path in glob.glob(os.path.join(FOLDER, '*.yaml')))
PAIRS = {
    'resnet34_resnet18': ('resnet34.tv_in1k', 'resnet18', 0.5),
    'resnet50_mobilenetv1': ('resnet50.tv_in1k', 'mobilenetv1_100', 2),
    'rvt_small_rvt_tiny': ('rvt_small', 'rvt_tiny', 0.5),
}
KINDS = ('dkd', 'reviewkd', 'scratch', 'finetune')
CLASSES, SIZE, BATCH = 3, 32, 3
# A tiny run. Branches have tests of their own and would take most of the time.
TINY = [
    '--device',
    'cpu',
    '--num-classes',
    CLASSES,
    '--input-size',
    3,
    SIZE,
    SIZE,
    '--batch-size',
    BATCH,
    '--gpd-branches',
    1,
]


def parse(config, *arguments):
    return parse_train_args(['--config', os.path.join(FOLDER, f'{config}.yaml'), *map(str, arguments)])


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """File of an architecture's random weights; each is made once."""
    folder = tmp_path_factory.mktemp('weights')

    def file(name):
        path = folder / f'{name}.pth'
        if not path.exists():
            torch.save(timm.create_model(name, num_classes=CLASSES).state_dict(), path)
        return path

    return file


@pytest.mark.parametrize('config', CONFIGS)
def test_values_are_the_recipes(config):
    pair, kind = config.rsplit('_', 1)
    teacher, student, beta = PAIRS[pair]
    args = parse(config)
    assert args.model.partition('.')[0] == student and args.num_classes == 1000
    recipe = dict(
        momentum=0.9,
        weight_decay=1e-4,
        clip_grad=5.0,
        clip_mode='norm',
        batch_size=512,
        grad_accum_steps=1,
        sched='multistep',
        decay_milestones=[30, 60, 90],
        decay_rate=0.1,
        warmup_epochs=0,
        smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        gpd=True,
        gpd_ratio=2,
        gpd_branches=6,
        gpd_loss='sce',
        gpd_weight=3.0,
        lr=0.01 if kind == 'finetune' else 0.1,
        epochs=50 if kind == 'finetune' else 100,
    )
    assert {name: getattr(args, name) for name in recipe} == recipe
    static = kind in ('dkd', 'reviewkd')
    assert args.kd_model_name == (teacher if static else None)
    if static:
        assert args.kd_distill_type == kind
        assert args.kd_loss_args == (dict(alpha=1, beta=beta, temperature=1) if kind == 'dkd' else dict(weight=1))


def test_there_is_one_of_each():
    assert CONFIGS == sorted(f'{pair}_{kind}' for pair in PAIRS for kind in KINDS)


@pytest.mark.parametrize('config', CONFIGS)
def test_two_steps(config, weights, monkeypatch):
    # tests/test_expansion.py, test_branches.py and test_rvt.py expand these students with all checks.
    monkeypatch.setattr(inverse_reparameterization, 'verify_plan', lambda *args: 0.0)
    monkeypatch.setattr(inverse_reparameterization, 'rehearse', lambda *args: None)
    recipe = parse(config)
    for name in (recipe.model, recipe.kd_model_name):
        if name and not timm.is_model(name):
            pytest.skip(f'timm_gpd does not register {name} in this version')
    files = []
    if recipe.pretrained:
        files += ['--pretrained-path', weights(recipe.model)]
    elif config.endswith('finetune'):
        files += ['--initial-checkpoint', weights(recipe.model)]
    if recipe.kd_model_name:
        files += ['--kd-model-path', weights(recipe.kd_model_name)]
    args = parse(config, *TINY, *files)
    student = create_student(args)
    set_input(student, resolve_input(args, student))
    if config.endswith('finetune'):
        started = torch.load(weights(args.model))
        assert all(
            torch.equal(started[name], tensor)
            for name, tensor in student.state_dict().items()
            if not name.startswith(student.pretrained_cfg['classifier'])
        )
    task = create_task(args, student, torch.device('cpu'))
    optimizer = create_optimizer(args, task)
    batches = [(torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))) for _ in range(2)]
    name = f'{student.pretrained_cfg["classifier"]}.weight'
    before = student.state_dict()[name].clone()
    losses = [f'{prefix}/{args.kd_distill_type}' for prefix in ('kd', 'teacher_kd')] if args.kd_model_name else []

    def step(index):
        settings = vars(LoopSettings.from_args(args))
        metrics = train_epoch(task, [batches[index]], optimizer, Compute(torch.device('cpu')), index, **settings)
        assert {name for name in metrics if '/' in name} == set(losses)
        terms = sum(metrics[name] for name in ['task_loss', 'teacher_task_loss', *losses])
        assert metrics['loss'] == pytest.approx(terms + 3 * metrics['gpd_loss'], rel=1e-4)
        return metrics

    first, second = step(0), step(1)
    # The dynamic teacher starts as the student, and is another model after a step.
    assert first['teacher_task_loss'] == pytest.approx(first['task_loss'], rel=1e-3)
    assert second['teacher_task_loss'] != pytest.approx(second['task_loss'], rel=1e-3)
    assert set(optimizer.state) == set(task.get_trainable_module().parameters())  # every parameter had a gradient
    assert not torch.equal(task.get_eval_model().state_dict()[name], before)
