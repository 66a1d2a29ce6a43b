"""Ending a run between two steps when it is told to: SIGTERM from a cluster, SIGINT from a keyboard."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any, Dict, Iterator, Optional

import torch
import torch.distributed as dist

from .processes import Processes

__all__ = ['Interruption', 'RunInterrupted', 'listen']

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # a preempted job has done what it could


class RunInterrupted(Exception):
    """A run was told to end, and has saved where it stands.

    Args:
        checkpoint: path of what it goes on from.
        signal_number: what told it.
    """

    def __init__(self, checkpoint: str, signal_number: int) -> None:
        super().__init__(
            f'{signal.Signals(signal_number).name}: saved to {checkpoint}; the same command with --resume auto goes on'
        )
        self.exit_code = EXIT_CODES[signal.Signals(signal_number)]


class Interruption:
    """Whether a run was told to end; all processes learn it between the same two steps.

    Args:
        processes: those that train together.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = 0  # number of the signal
        self.pending: Optional[Any] = None
        self.agreed = torch.zeros(1, dtype=torch.int64)

    def receive(self, number: int, frame: Optional[FrameType]) -> None:
        """Handles a signal. The second one ends the process at once."""
        if self.received:
            os._exit(128 + number)
        self.received = number

    def check(self) -> int:
        """The number of the signal that the run shall end for, 0 if it goes on. Called after every update, by all.

        Among several processes the answer is about the update before: it has travelled while this one was computed.
        """
        if not self.processes.is_distributed:
            return self.received
        if self.pending is not None:
            self.pending.wait()
            if self.agreed.item():
                return int(self.agreed.item())
        self.agreed = torch.tensor([self.received])
        self.pending = dist.all_reduce(self.agreed, op=dist.ReduceOp.MAX, group=self.processes.control, async_op=True)
        return 0


@contextlib.contextmanager
def listen(processes: Processes) -> Iterator[Interruption]:
    """Handles SIGTERM and SIGINT within it.

    Args:
        processes: those that train together.

    Yields:
        What tells whether one has come.
    """
    interruption = Interruption(processes)
    before: Dict[int, Any] = {number: signal.signal(number, interruption.receive) for number in EXIT_CODES}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
