"""The processes of a run: one for each GPU, or as many as torchrun or SLURM has started on CPUs."""

import contextlib
import datetime
import logging
from dataclasses import dataclass
from typing import Any, Iterator, List, Optional

import torch
import torch.distributed as dist
from huggingface_hub import constants as hub_settings
from timm.task import TrainingTask
from timm.utils import distribute_bn
from timm.utils.distributed import init_distributed_device_so

from ..errors import UsageError, first_line

__all__ = ['Processes', 'start_processes']

CONTROL_TIMEOUT = datetime.timedelta(hours=2)  # how long the others wait for the first, which may download


@dataclass(frozen=True)
class Processes:
    """What a process knows of those that train with it.

    Attributes:
        device: the device of this process.
        rank: its number among all, from 0.
        local_rank: its number among those of this machine, from 0.
        world_size: how many there are.
        control: group of all on the CPU, for what is not the model's; None where there is one process.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: Optional[dist.ProcessGroup] = None

    @property
    def is_primary(self) -> bool:
        """Whether this is the one that writes and logs."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @contextlib.contextmanager
    def primary_first(self) -> Iterator[None]:
        """What stands in it happens in the first process of every machine, then in the others, without the Hub.

        So files are downloaded or written once, and the others find them.
        """
        if not self.is_distributed:
            yield
            return
        if self.local_rank == 0:
            yield
            self.wait()
            return
        self.wait()
        offline = hub_settings.HF_HUB_OFFLINE
        hub_settings.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            hub_settings.HF_HUB_OFFLINE = offline

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.is_distributed:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process; the same answer in all."""
        if not self.is_distributed:
            return flag
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return bool(tensor)

    def gather(self, value: Any) -> List[Any]:
        """A value of every process, in the order of ranks; in the first process, elsewhere nothing."""
        if not self.is_distributed:
            return [value]
        values: Optional[List[Any]] = [None] * self.world_size if self.is_primary else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def gather_everywhere(self, value: Any) -> List[Any]:
        """A value of every process, in the order of ranks; in all of them."""
        if not self.is_distributed:
            return [value]
        values: List[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: Any) -> Any:
        """The first process's value, in all."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def sum(self, values: List[float]) -> List[float]:
        """Sums over all processes, of numbers in the same order in each."""
        if not self.is_distributed:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def wrap(self, task: TrainingTask, broadcast_buffers: bool = True) -> None:
        """Lets a task share gradients among the processes, which all get the first one's weights. In place.

        Args:
            task: the task, compiled if it shall be.
            broadcast_buffers: whether every step begins with the buffers of the first process.
        """
        if self.is_distributed:
            device_ids = [self.device.index] if self.device.type == 'cuda' else None
            # torch 2.14 has a new name for it, and warns of the old one even where it is the default.
            settings = {} if broadcast_buffers else {'broadcast_buffers': False}
            task.prepare_distributed(device_ids=device_ids, **settings)

    def share_statistics(self, task: TrainingTask, how: str) -> None:
        """Makes running statistics of batch norm the same in all processes, in place.

        Args:
            task: what is trained, and its average.
            how: ``'reduce'``: their mean, ``'broadcast'``: the first process's, ``''``: they stay as they are.
        """
        if self.is_distributed and how in ('reduce', 'broadcast'):
            for module in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
                if module is not None:
                    distribute_bn(module, self.world_size, how == 'reduce')


@contextlib.contextmanager
def start_processes(device: str, backend: Optional[str] = None, url: Optional[str] = None) -> Iterator[Processes]:
    """Joins the processes that torchrun or SLURM has started with this one, by their environment variables.

    Only the first one logs: what it warns of is true of all.

    Args:
        device: name of a torch device; among several processes each takes the GPU of its local rank.
        backend: of ``torch.distributed`` (default: ``nccl`` on GPUs, ``gloo`` on CPUs).
        url: where they meet (default: what torchrun has set).

    Yields:
        What this process knows of them. Afterwards it has left them.

    Raises:
        UsageError: if the device is not there, or the others cannot be met.
    """
    try:
        found = init_distributed_device_so(device=device, dist_backend=backend, dist_url=url)
        own = torch.device(found['device'])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f'device {device} cannot be used: {first_line(error)} (try --device cpu)')
    processes = Processes(
        device=own,
        rank=found['global_rank'],
        local_rank=found['local_rank'],
        world_size=found['world_size'],
        control=dist.new_group(backend='gloo', timeout=CONTROL_TIMEOUT) if found['distributed'] else None,
    )
    if not processes.is_primary:
        logging.root.setLevel(logging.ERROR)
    yield processes
    # A process that fails leaves without a word to the others, for which they may keep it waiting: its end is theirs.
    if processes.is_distributed:
        dist.destroy_process_group()
