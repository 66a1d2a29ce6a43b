"""What a benchmark ran on."""

import contextlib
import platform

import torch


def device_name(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    return f'{processor_name()}, {torch.get_num_threads()} threads'


def processor_name() -> str:
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        for line in file:
            if line.startswith('model name'):
                return line.split(':')[1].strip()
    return platform.machine()
