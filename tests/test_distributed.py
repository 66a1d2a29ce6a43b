"""Two processes with half a batch each train as one does with all of it."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from timm.task import TrainingTask
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from conftest import TINY_RESNET
from timm_gpd import DistillationTask, GapPreservingTask
from timm_gpd.task.gap_control import GapTarget, Switch
from timm_gpd.task.own_norms import OwnNorms

STEPS = 2
APART = 0.3  # standard deviation
LIMIT = 0.1
# Neither batch norm nor relations between images: all losses are means over images.
TASKS = {
    'gpd': lambda: GapPreservingTask(make_student(), num_branches=3, noise=0.1, verbose=False),
    'gpd and static': lambda: GapPreservingTask(
        make_student(), make_static_teacher(), distill_type='kd,dkd', num_branches=3, noise=0.1, verbose=False
    ),
    **{
        method: lambda method=method: GapPreservingTask(
            make_student(), ratio=3, num_branches=2, method=method, noise=0.1, verbose=False
        )
        for method in ('sandwich', 'netaug')
    },
    'switch': lambda: make_apart(Switch()),
    'gap target': lambda: make_apart(GapTarget(0.5, 'distillation')),
    'own norms': lambda: make_clipped(),
    'static': lambda: DistillationTask(make_student(), make_static_teacher(), distill_type='kd,dkd', verbose=False),
}
# Batch norm and centres of classes: each process has a batch of its own, and gradients are still shared.
WITH_STATE = 'with state'
# The same, and the dynamic teacher's loss, with distillers that no other loss has, is always left out.
PAUSED = 'with state, paused'
# One whose student has parameters that no logits depend on, which DDP is told to look for.
UNUSED = 'unused parameters'
# The first of them, each parameter in two shards: fully_shard of all that is trained.
SHARDED = 'sharded'


def make_student():
    student = timm.create_model('test_convnext', num_classes=10, in_chans=1)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


def make_static_teacher():
    teacher = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=32)
    teacher.pretrained_cfg.update(mean=(0.3,), std=(0.2,))
    return teacher


class PartlyUnused(nn.Module):
    """A head is left from pretraining."""

    def __init__(self):
        super().__init__()
        self.stem, self.pretraining_head, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.stem(x).relu().mean((2, 3)))


class AlwaysPaused(Switch):
    def decide(self, *batch):
        return {**super().decide(*batch), 'paused': torch.ones(())}


def make_apart(gap_control):
    """A task whose dynamic teacher is far from its student."""
    task = GapPreservingTask(make_student(), gap_control=gap_control, verbose=False)
    with torch.no_grad():
        for parameter in task.get_dynamic_teacher().parameters():
            parameter += APART * torch.randn_like(parameter)
    return task


def make_clipped():
    """A task whose two gradients are clipped by their own norms, which bind."""
    task = GapPreservingTask(make_student(), scale='balanced', noise=0.1, verbose=False)
    task.clip = OwnNorms(task)
    return task


def make_task(name):
    torch.manual_seed(0)
    if name == UNUSED:
        return GapPreservingTask(PartlyUnused(), classifier='fc', verbose=False).double().train()
    if name not in (WITH_STATE, PAUSED):
        return TASKS[name]().double().train()
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return (
        GapPreservingTask(
            student,
            make_static_teacher(),
            distill_type='reviewkd,ofa,nd',
            gap_control=AlwaysPaused() if name == PAUSED else None,
            verbose=False,
        )
        .double()
        .train()
    )


def train(task: TrainingTask, part: slice):
    """Gradients of every step, by parameter name."""
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for _ in range(STEPS):
        x = torch.randn(8, 1, 32, 32, generator=generator, dtype=torch.float64)
        target = torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        task(x[part], target[part])['loss'].backward()
        if hasattr(task, 'clip'):
            task.clip(LIMIT)
        gradients.append(
            {
                name.removeprefix('module.'): whole(parameter.grad).clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )
        optimizer.step()
    return gradients


def whole(tensor):
    """All of a tensor, of which each process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_half(rank, names, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for name in names:
        task = make_task(name)
        task.prepare_distributed(**({'find_unused_parameters': True} if name == UNUSED else {}))
        torch.save(train(task, slice(4 * rank, 4 * rank + 4)), f'{folder}/{name} {rank}.pt')
    task = make_task('gpd')
    fully_shard(task.get_trainable_module(), mesh=init_device_mesh('cpu', (2,)))
    torch.save(train(task, slice(4 * rank, 4 * rank + 4)), f'{folder}/{SHARDED} {rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """Folder of what two processes found for every task: starting them takes longer than they run."""
    folder = tmp_path_factory.mktemp('distributed')
    mp.start_processes(
        train_half, args=([*TASKS, WITH_STATE, PAUSED, UNUSED], str(folder)), nprocs=2, start_method='fork'
    )
    return folder


@pytest.mark.parametrize('name', [*TASKS, SHARDED, UNUSED])
def test_two_processes_train_as_one(halves, name):
    task = 'gpd' if name == SHARDED else name
    expected = train(make_task(task), slice(None))
    ranks = [torch.load(halves / f'{name} {rank}.pt') for rank in range(2)]
    for step, gradients in enumerate(expected):
        assert not any('pretraining_head' in parameter for parameter in gradients)
        for parameter, gradient in gradients.items():
            for rank in ranks:
                torch.testing.assert_close(
                    rank[step][parameter], gradient, rtol=1e-8, atol=1e-12, msg=f'{parameter} in step {step}'
                )
        assert any(gradient.any() for gradient in gradients.values())
    alone = train(make_task(task), slice(4))[0]
    assert not all(torch.allclose(alone[key], expected[0][key], rtol=1e-3) for key in alone), 'half a batch is no whole'


def decisions(part):
    """Which steps are paused where one process trains on these images."""
    task = make_task('switch')
    found, decide = [], task.gap_control.decide
    task.gap_control.decide = lambda *batch: found.append(decide(*batch)) or found[-1]
    train(task, part)
    return [bool(terms['paused']) for terms in found]


def test_a_process_alone_would_decide_otherwise():
    """So the gradients above are of what both have decided together."""
    together, alone = decisions(slice(None)), decisions(slice(4))
    assert sorted(together) == [False, True] and together != alone


@pytest.mark.parametrize('name', [WITH_STATE, PAUSED])
def test_every_parameter_gets_one_gradient_for_both_processes(halves, name):
    """The reducer refuses a second step if a parameter had no gradient in the first."""
    first, second = (torch.load(halves / f'{name} {rank}.pt') for rank in range(2))
    alone = train(make_task(name), slice(4))
    assert len(first) == STEPS and first[0].keys() == alone[0].keys()
    for step in range(STEPS):
        assert all(torch.equal(second[step][name], gradient) for name, gradient in first[step].items())
        assert not torch.allclose(first[step]['model.wide.conv1.0.weight'], alone[step]['model.wide.conv1.0.weight'])


def test_the_models_are_found_behind_the_wrapper(tmp_path):
    """One process is enough for that."""
    plain = make_task('gpd and static')
    task = copy.deepcopy(plain)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task.prepare_distributed()
        assert task.get_dynamic_teacher() is task.get_trainable_module().module.model
        torch.testing.assert_close(
            task.get_task_state()['distillers'], plain.get_task_state()['distillers'], atol=0, rtol=0
        )
    finally:
        dist.destroy_process_group()
