"""Epochs that are the same whenever they are run again, from any batch on: what an exact resume rests on.

Every random number of a run is drawn after seeding with what it is for: the run's seed, the epoch, and the position
of the image or the number of the batch. So nothing about random numbers has to be saved, worker processes may live as
long as they like and load ahead as far as they like, and what was loaded before a run was killed is loaded alike
after it. Images are numbered over all processes, so that two processes augment them as one does.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from ..processes import Processes

__all__ = ['ReplayedLoader', 'seed_for', 'seed_for_hand_over', 'seed_of']


def seed_of(*what: int) -> int:
    """A seed that differs wherever one of some numbers does.

    Args:
        *what: numbers that say what the random numbers are for.

    Returns:
        A number below 2^63, well mixed.
    """
    digest = hashlib.blake2b(b','.join(b'%d' % number for number in what), digest_size=8)
    return int.from_bytes(digest.digest(), 'little') >> 1


def seed_for(*what: int) -> None:
    """Seeds the global generators of Python, NumPy and torch, on all devices, see :func:`seed_of`."""
    seed = seed_of(*what)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# What seeds are for, besides the epoch and a number in it.
_ORDER, _IMAGE, _LOADED, _STEP, _HAND_OVER = range(5)


def seed_for_hand_over(seed: int, epoch: int) -> None:
    """Seeds the global generators for what is made anew before an epoch, alike in all processes.

    Args:
        seed: seed of the run.
        epoch: index of the epoch, from 0.
    """
    seed_for(seed, _HAND_OVER, epoch)


class _Draw(NamedTuple):
    """One image of a batch, as it travels to a worker process."""

    index: Any
    seed: int


class _SeededDataset(Dataset):
    """Seeds the generators before it reads an image, so that an augmentation depends on nothing that came before.

    The batch is put together after its last image, in the same process: mixing it depends on nothing else either.
    A dataset that reads whole batches is handed the seeds of their images: seeding all generators takes longer than it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: _Draw) -> Any:
        seed_for(draw.seed)
        return self.dataset[draw.index]

    def __getitems__(self, draws: List[_Draw]) -> Any:
        if not hasattr(self.dataset, 'read_batch'):
            return [self[draw] for draw in draws]
        seed_for(draws[-1].seed)
        return self.dataset.read_batch([draw.index for draw in draws], [draw.seed for draw in draws])


@dataclass
class _Epoch:
    """What is being run, for those that seed something in it.

    Not the loader itself, which knows them: what knows one another waits for Python's garbage collector, and when that
    comes by, worker processes get no word from their queues, and are waited for in vain.
    """

    processes: Processes
    seed: int
    number: int = 0
    first_batch: int = 0

    def seed_for(self, purpose: int, number: int) -> None:
        """Seeds the generators of this process for a batch of this epoch."""
        seed_for(self.seed, purpose, self.number, number, self.processes.rank)


class _Draws:
    """Batches of an epoch from some batch on, in the order that a batch sampler gives them, with seeds."""

    def __init__(self, batch_sampler: Any, epoch: _Epoch) -> None:
        self.batch_sampler, self.epoch = batch_sampler, epoch

    def __len__(self) -> int:
        return len(self.batch_sampler) - self.epoch.first_batch

    def __iter__(self) -> Iterator[List[_Draw]]:
        epoch, step = self.epoch, self.epoch.processes.world_size
        position = epoch.processes.rank
        for number, batch in enumerate(self.batch_sampler):
            positions = range(position, position + len(batch) * step, step)
            if number >= epoch.first_batch:
                seeds = (seed_of(epoch.seed, _IMAGE, epoch.number, place) for place in positions)
                yield [_Draw(index, seed) for index, seed in zip(batch, seeds)]
            position = positions.stop


class _SeededBatches:
    """A loader that seeds before it hands out a batch, for what a prefetcher does to it on the device."""

    def __init__(self, loader: DataLoader, epoch: _Epoch) -> None:
        self.loader, self.epoch = loader, epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader, start=self.epoch.first_batch):
            self.epoch.seed_for(_LOADED, number)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class ReplayedLoader:
    """Runs the epochs of a training loader, each as a function of the seed and the epoch alone.

    Of data sets that are read as a stream, the order is the reader's; what comes before the first batch of a resumed
    epoch is read and thrown away.

    Args:
        loader: one of timm's ``create_loader``, with a prefetcher or without. It must not be iterated elsewhere.
        seed: seed of the run.
        processes: those that train together; each has a loader of its own part of the data.
    """

    def __init__(self, loader: Any, seed: int, processes: Processes) -> None:
        self.seed = seed
        self.epoch = _Epoch(processes, seed)
        inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
        self.batches_per_epoch = len(inner)
        self.collate_fn = inner.collate_fn
        self.is_stream = isinstance(inner.dataset, IterableDataset)
        if self.is_stream:
            self.orders = [inner.dataset]
        else:
            # One process orders images as several do together, by the epoch.
            if isinstance(inner.batch_sampler.sampler, RandomSampler):
                inner.batch_sampler.sampler = DistributedSampler(inner.dataset, num_replicas=1, rank=0)
            self.orders = [inner.batch_sampler, inner.batch_sampler.sampler]
            self.draws = _Draws(inner.batch_sampler, self.epoch)
        self.batches = _SeededBatches(inner if self.is_stream else self._seeded(inner), self.epoch)
        if isinstance(loader, PrefetchLoader):
            loader.loader = self.batches  # type: ignore[assignment]
        self.loader = loader if isinstance(loader, PrefetchLoader) else self.batches

    def _seeded(self, loader: DataLoader) -> DataLoader:
        """A loader of the same images, in the order of the draws. Its worker processes are new."""
        dataset = loader.dataset
        return DataLoader(
            dataset if isinstance(dataset, _SeededDataset) else _SeededDataset(dataset),
            batch_sampler=self.draws,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return self.batches_per_epoch

    def turn_mixup_off(self) -> None:
        """Mixes no batch from the next epoch on, if the loader does. Worker processes have copies of what mixes."""
        if getattr(self.collate_fn, 'mixup_enabled', False):
            self.collate_fn.mixup_enabled = False
            if not self.is_stream:
                self.batches.loader = self._seeded(self.batches.loader)

    def run_epoch(self, epoch: int, first_batch: int = 0, attempt: int = 0) -> Iterator[Tuple[int, Any]]:
        """Batches of an epoch. Before each is handed out, the generators are seeded for the step that it is for.

        Args:
            epoch: index of the epoch, from 0.
            first_batch: index of the batch to begin with.
            attempt: another number makes other orders and other random numbers.

        Yields:
            The index of a batch in its epoch, and the batch.
        """
        self.epoch.seed = seed_of(self.seed, attempt) if attempt else self.seed
        self.epoch.number, self.epoch.first_batch = epoch, 0 if self.is_stream else first_batch
        for order in self.orders:
            if isinstance(order, DistributedSampler):
                order.seed = self.epoch.seed
            if hasattr(order, 'set_epoch'):
                order.set_epoch(epoch)
        seed_for(self.epoch.seed, _ORDER, epoch)
        for number, batch in enumerate(self.loader, start=self.epoch.first_batch):
            if number >= first_batch:
                self.epoch.seed_for(_STEP, number)
                yield number, batch
