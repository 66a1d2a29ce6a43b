"""Which functions are watched, and who handles them.

A handler edits the arguments of a call before it is made: it replaces parameters that meet something wider, and numbers
that count channels. Handlers register themselves here; the dry run looks them up.
"""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch.nn as nn

from ..widening import Widening

__all__ = [
    'Arguments', 'Call', 'Named', 'Positional', 'find_handler', 'find_stand_in', 'handle_module', 'stand_in', 'watch',
    'watch_methods', 'watch_module',
]

Call = Dict[str, Any]  # the arguments of a call, by name
Positional = Tuple[Any, ...]
Named = Dict[str, Any]
Arguments = Tuple[Positional, Named]
Handler = Callable[[Widening, Positional, Named], Arguments]
ModuleHandler = Callable[[Widening, str, Any, Any], None]

_HANDLERS: Dict[Callable, Handler] = {}
_METHOD_HANDLERS: Dict[str, Handler] = {}
_MODULE_HANDLERS: Dict[type, ModuleHandler] = {}
_STAND_INS: Dict[Callable, Callable] = {}


def watch(*functions: Callable, names: Sequence[str]) -> Callable:
    """Decorates a handler of functions whose arguments have names.

    Args:
        *functions: torch functions.
        names: names of their arguments, in order.

    Returns:
        A decorator of ``handler(widening, call)``, which edits the call's arguments in place.
    """
    def register(handler: Callable[[Widening, Call], None]) -> Callable[[Widening, Call], None]:
        def handle(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
            call: Call = {**dict(zip(names, args)), **kwargs}
            handler(widening, call)
            return (), call
        _HANDLERS.update(dict.fromkeys(functions, handle))
        return handler
    return register


def watch_methods(*names: str) -> Callable[[Handler], Handler]:
    """Decorates a handler of functions and operators by their names, such as ``'add'`` for ``torch.add`` and ``+=``.

    Args:
        *names: names without underscores around them.

    Returns:
        A decorator of ``handler(widening, args, kwargs)``, which returns the arguments to call with.
    """
    def register(handler: Handler) -> Handler:
        _METHOD_HANDLERS.update(dict.fromkeys(names, handler))
        return handler
    return register


def watch_module(module_class: type) -> Callable[[ModuleHandler], ModuleHandler]:
    """Decorates a handler of layers that check their sizes before they call any function.

    Args:
        module_class: the class; its subclasses are handled too.

    Returns:
        A decorator of ``handler(widening, name, module, input)``, which is called before the module's forward.
    """
    def register(handler: ModuleHandler) -> ModuleHandler:
        _MODULE_HANDLERS[module_class] = handler
        return handler
    return register


def stand_in(*functions: Callable) -> Callable[[Callable], Callable]:
    """Decorates what is called instead of functions whose outputs have known shapes and take long to find out.

    Args:
        *functions: torch functions.

    Returns:
        A decorator of a function of the same arguments, which returns blank outputs.
    """
    def register(substitute: Callable) -> Callable:
        _STAND_INS.update(dict.fromkeys(functions, substitute))
        return substitute
    return register


def find_handler(function: Callable) -> Optional[Handler]:
    """The handler of a function; None if it is not watched."""
    return _HANDLERS.get(function) or _METHOD_HANDLERS.get(getattr(function, '__name__', '').strip('_'))


def find_stand_in(function: Callable) -> Callable:
    """What to call in the place of a function: itself, unless something stands in for it."""
    return _STAND_INS.get(function, function)


def handle_module(widening: Widening, name: str, module: nn.Module, x: Any) -> None:
    """Lets the handlers of a module's class see it, and its first input, before its forward runs."""
    for module_class, handler in _MODULE_HANDLERS.items():
        if isinstance(module, module_class):
            handler(widening, name, module, x)
