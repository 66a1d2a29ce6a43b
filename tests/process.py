"""What everything in a process shares, and how a test leaves it as it was.

Four things are left out. glibc's allocator, which `train.py` tunes, cannot be asked for its settings. From timm's
registry of models nothing can be removed. pytest itself restores the filters of warnings. Random numbers are seeded
before every test.
"""

import ctypes
import logging
import os
import platform
import signal
import sys
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, NamedTuple

import timm.optim  # noqa: F401  which sets a limit of Dynamo when it is imported
import torch
import torch._dynamo.config
import torch._inductor.config
import torch.distributed as dist
from timm.layers import is_fast_norm, set_fast_norm

from timm_gpd.training.cpu import keep_freed_memory


class Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], None]


def _denormals_are_zero() -> bool:
    return (torch.full((1,), 1e-20) * 1e-20).count_nonzero().item() == 0


def _handlers() -> Dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _write_handlers(handlers: Dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _environment() -> Dict[str, str]:
    """All but what pytest says of itself, and what OpenMP's libraries and older compilers of torch set."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ('PYTEST_CURRENT_TEST', 'TORCHINDUCTOR_CACHE_DIR') and not name.startswith('KMP_')
    }


def _write_environment(environment: Dict[str, str]) -> None:
    for name in _environment().keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _write_distributed(initialized: bool) -> None:
    if dist.is_initialized() and not initialized:
        dist.destroy_process_group()


def _config(config: Any) -> Setting:
    """Settings of a part of ``torch.compile``; those that differ are written, as writing others may warn."""

    def write(before):
        now = config.get_config_copy()
        for name in before:
            if now[name] != before[name]:
                setattr(config, name, before[name])

    return Setting(config.get_config_copy, write)


def _logger(name: str) -> Setting:
    """Level and handlers of a logger, but for those through which pytest listens."""
    logger = logging.getLogger(name)

    def read():
        handlers = [handler for handler in logger.handlers if not type(handler).__module__.startswith('_pytest')]
        return logger.level, handlers

    def write(value):
        level, handlers = value
        logger.setLevel(level)
        for handler in read()[1]:
            logger.removeHandler(handler)
        for handler in handlers:
            logger.addHandler(handler)

    return Setting(read, write)


SETTINGS = {
    'denormal numbers are 0': Setting(_denormals_are_zero, torch.set_flush_denormal),
    'Inductor': _config(torch._inductor.config),
    'Dynamo': _config(torch._dynamo.config),
    'norms are fast': Setting(is_fast_norm, set_fast_norm),
    'signals': Setting(_handlers, _write_handlers),
    'default dtype': Setting(torch.get_default_dtype, torch.set_default_dtype),
    'number of threads': Setting(torch.get_num_threads, torch.set_num_threads),
    'gradients are recorded': Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    'a process group is there': Setting(dist.is_initialized, _write_distributed),
    'environment': Setting(_environment, _write_environment),
    'working directory': Setting(os.getcwd, os.chdir),
    'command line': Setting(lambda: list(sys.argv), lambda argv: setattr(sys, 'argv', argv)),
    'import path': Setting(lambda: list(sys.path), lambda path: setattr(sys, 'path', path)),
    **{f'logger {name or "root"}': _logger(name) for name in ('', 'train', 'validate', 'timm', 'timm_gpd')},
}


def read_settings() -> Dict[str, Any]:
    """Values of all settings, by name."""
    return {name: setting.read() for name, setting in SETTINGS.items()}


def restore_settings(before: Dict[str, Any]) -> Dict[str, str]:
    """Sets what differs back to what it was; returns what differed and how, by name."""
    changed = {}
    for name, value in read_settings().items():
        if value != before[name]:
            changed[name] = _describe(before[name], value)
            SETTINGS[name].write(before[name])
    return changed


def _describe(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        return ', '.join(
            f'{key}: {before.get(key)!r} became {after.get(key)!r}'
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        )
    return f'{before!r} became {after!r}'


@contextmanager
def kept_settings() -> Iterator[None]:
    """Lets a program that sets switches of its process run in this one."""
    before = read_settings()
    try:
        yield
    finally:
        restore_settings(before)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Lets glibc keep what is freed: mapping and clearing large tensors anew took a third of some tests' time."""
    undo = keep_freed_memory()
    try:
        yield
    finally:
        undo()
        if platform.libc_ver()[0] == 'glibc':
            ctypes.CDLL(None).malloc_trim(0)
