"""One handler for each torch function that is watched, in files by kind of layer; importing this registers them all."""

from . import attention, convolution, elementwise, linear, norm, product, recurrent
from .registry import find_handler, find_stand_in, handle_module, watched

__all__ = ['find_handler', 'find_stand_in', 'handle_module', 'watched']
