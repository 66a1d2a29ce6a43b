"""Training steps on small random batches."""

import contextlib
import gc
import weakref

import torch

from timm_gpd.teacher.shared_tensors import SharedTensors
from timm_gpd.training.checkpoints import Position
from timm_gpd.training.loop import LoopSettings, TrainingLoop
from timm_gpd.training.processes import Processes


def batch(seed=1, size=8):
    """Images (B, 1, 32, 32) and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def train(task, optimizer, steps, first=0, size=8):
    """Losses of some steps; each has a batch of its own."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        torch.manual_seed(step)  # distillers have dropout
        loss = task(*batch(step, size))['loss']
        loss.backward()
        optimizer.step()
        task.update_ema(step + 1)
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def saved_tensors_counted():
    """Within it: a hook that takes down how many tensors are kept for a backward pass, and what it has taken down."""
    saved, counts = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    def count(*_):
        gc.collect()
        counts.append(len(saved))

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda packed: packed.tensor):
        yield count, counts


class Batches(list):
    """Batches as a training loop takes them, the same in every epoch."""

    def run_epoch(self, epoch, first_batch=0, attempt=0):
        yield from list(enumerate(self))[first_batch:]

    def turn_mixup_off(self):
        raise AssertionError('nothing here mixes')


def train_epoch(task, batches, optimizer, compute, epoch=0, num_epochs=1, **settings):
    """One epoch of a training loop on batches of images and targets; the means of its losses."""
    processes, settings = Processes(compute.device), LoopSettings(**settings)
    loop = TrainingLoop(task, Batches(batches), optimizer, compute, processes, settings, num_epochs=num_epochs)
    return loop.train_epoch(Position(epoch))


def change_what_the_student_gets(monkeypatch, change):
    """A fault of dynamic teachers: the student inside runs on tensors that a function has changed."""
    of_student = SharedTensors.of_student
    monkeypatch.setattr(
        SharedTensors,
        '__call__',
        lambda self, stored: (
            self.of_teacher(stored),
            {name: change(tensor) for name, tensor in of_student(self, stored).items()},
        ),
    )
