"""Ending a run between two steps when it is told to: SIGTERM from a cluster, SIGINT from a keyboard."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Callable, Dict, Iterator, NoReturn, Optional

import torch
import torch.distributed as dist

from ..errors import RunEnded
from .processes import Processes

__all__ = ['Interruption', 'end_at_once', 'keep_workers', 'listen']

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # a preempted job has done what it could


class Interruption:
    """Whether a run was told to end; all processes learn it between the same two steps.

    Args:
        processes: those that train together.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.process = os.getpid()
        self.received = 0  # number of the signal
        self.pending: Optional[Any] = None
        self.agreed = torch.tensor(0)

    def receive(self, number: int, frame: Optional[FrameType]) -> None:
        """Handles a signal. The second one ends the process at once."""
        if os.getpid() != self.process:  # a child has this too until it has handlers of its own
            return
        if self.received:
            os._exit(128 + number)
        self.received = number

    def check(self, wait: bool = False) -> bool:
        """Whether the run shall end. Called by all processes, at the same points of the run.

        Args:
            wait: for all processes to be here. Else the answer is about the last call: it has travelled since.
        """
        if not self.processes.is_distributed:
            return bool(self.received)
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        if not self.agreed:
            self.agreed, current = torch.tensor(self.received), self.agreed
            self.pending = dist.all_reduce(
                self.agreed, op=dist.ReduceOp.MAX, group=self.processes.control, async_op=True
            )
            if not wait:
                return bool(current)
            self.pending.wait()
            self.pending = None
        return bool(self.agreed)

    def end(self, checkpoint: str) -> NoReturn:
        """Ends the run.

        Args:
            checkpoint: path of what it goes on from.

        Raises:
            RunEnded: always.
        """
        number = signal.Signals(int(self.agreed) if self.processes.is_distributed else self.received)
        message = f'{number.name}: saved to {checkpoint}; the same command with --resume {checkpoint} goes on'
        raise RunEnded(message if self.processes.is_primary else '', EXIT_CODES[number])


@contextlib.contextmanager
def listen(processes: Processes) -> Iterator[Interruption]:
    """Handles SIGTERM and SIGINT within it.

    Args:
        processes: those that train together.

    Yields:
        What tells whether one has come.
    """
    interruption = Interruption(processes)
    with _handled_by(interruption.receive):
        yield interruption


@contextlib.contextmanager
def end_at_once(program: str) -> Iterator[None]:
    """Ends the process at SIGTERM and SIGINT, with the exit code of a run, while nothing can be lost yet.

    Args:
        program: what the line that says so begins with.

    Yields:
        Nothing; :func:`listen` takes over within it.
    """

    def end(number: int, frame: Optional[FrameType]) -> None:
        print(f'{program}: {signal.Signals(number).name}: nothing was trained', file=sys.stderr, flush=True)
        os._exit(EXIT_CODES[signal.Signals(number)])

    with _handled_by(end):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Optional[FrameType]], None]) -> Iterator[None]:
    """Within it a function handles SIGTERM and SIGINT; afterwards what did before."""
    before: Dict[int, Any] = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def keep_workers(loader: Any) -> None:
    """Lets a loader's worker processes end with this process alone, in place.

    Who tells a run to end may tell all processes of its group, and the step that is to be finished needs its images.

    Args:
        loader: one of timm's ``create_loader``, or None. It has not been iterated.
    """
    inner = getattr(loader, 'loader', loader)  # of a prefetcher
    if inner is not None:
        inner.worker_init_fn = _KeptWorker(inner.worker_init_fn)


class _KeptWorker:
    """Initialises a worker process; afterwards, as torch sets a handler of SIGTERM before."""

    def __init__(self, initialise: Optional[Callable[[int], None]]) -> None:
        self.initialise = initialise

    def __call__(self, worker_id: int) -> None:
        if self.initialise is not None:
            self.initialise(worker_id)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, 'sigwaitinfo'):  # which macOS lacks; there torch's own handler stays
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends the process when its parent says so by SIGTERM, as it does when it ends itself; nobody else can."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
