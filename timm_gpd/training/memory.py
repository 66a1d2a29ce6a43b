"""Out of memory, in one line that says what to lower."""

import argparse
from contextlib import contextmanager
from typing import Iterator

import torch

from ..errors import UsageError, first_line

__all__ = ['is_out_of_memory', 'memory_errors']

# What allocators say that raise a plain RuntimeError.
_PHRASES = ('out of memory', 'not enough memory', "can't allocate memory", 'cannot allocate memory', 'alloc_failed')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


@contextmanager
def memory_errors(args: argparse.Namespace, batch_size: int) -> Iterator[None]:
    """Turns running out of memory, also of a process that loads images, into a UsageError that says what to lower.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        batch_size: images that a process computes on at once.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith('DataLoader worker'):
            raise UsageError(
                f'{first_line(error)} (the machine may be out of memory: lower --workers, {args.workers})'
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UsageError(f'out of memory with batches of {batch_size}: {"; or ".join(_advice(args))}') from error


def _advice(args: argparse.Namespace) -> Iterator[str]:
    if not hasattr(args, 'grad_accum_steps'):  # of validate.py
        yield 'lower --batch-size, which --retry does'
    else:
        yield f'lower --batch-size, and raise --grad-accum-steps ({args.grad_accum_steps}) as many times'
        if not args.grad_checkpointing:
            yield 'compute activations twice, by --grad-checkpointing'
    if not args.amp and args.model_dtype in (None, 'float32'):
        yield 'compute in lower precision, by --amp'
    if getattr(args, 'gpd', False):
        lower = [f'--gpd-ratio ({args.gpd_ratio})'] if args.gpd_ratio > 2 else []
        lower += [f'--gpd-branches ({args.gpd_branches})'] if args.gpd_branches > 1 else []
        if lower:
            yield f'lower {" or ".join(lower)}'
