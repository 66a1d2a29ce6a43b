"""Which functions are watched, and who handles them.

A handler edits the arguments of a call before it is made: it replaces parameters that meet something wider, and numbers
that count channels. Handlers register themselves here; the dry run looks them up.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..widening import Widening

__all__ = [
    'Arguments',
    'Call',
    'Named',
    'Positional',
    'find_handler',
    'find_stand_in',
    'forms',
    'handle_module',
    'stand_in',
    'watch',
    'watch_call',
    'watch_module',
    'watch_where',
    'watched',
]

Call = Dict[str, Any]  # the arguments of a call, by name
Positional = Tuple[Any, ...]
Named = Dict[str, Any]
Arguments = Tuple[Positional, Named]
Handler = Callable[[Widening, Positional, Named], Arguments]
Condition = Callable[[Callable, Positional, Named], bool]
ModuleHandler = Callable[[Widening, str, Any, Any], None]

_HANDLERS: Dict[Callable, Handler] = {}
_KINDS: List[Tuple[Condition, Handler]] = []
_MODULE_HANDLERS: Dict[type, ModuleHandler] = {}
_STAND_INS: Dict[Callable, Callable] = {}


def watch(*functions: Callable, names: Sequence[str]) -> Callable:
    """Decorates a handler of functions whose arguments have names.

    Args:
        *functions: torch functions.
        names: names of their arguments, in order; those that come after are passed on.

    Returns:
        A decorator of ``handler(widening, call)``, which edits the call's arguments in place.
    """

    def register(handler: Callable[[Widening, Call], None]) -> Callable[[Widening, Call], None]:
        def handle(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
            call: Call = {**dict(zip(names, args)), **kwargs}
            handler(widening, call)
            return (*(call.pop(name) for name in names[: len(args)]), *args[len(names) :]), call

        _HANDLERS.update(dict.fromkeys(functions, handle))
        return handler

    return register


def watch_call(*functions: Callable) -> Callable[[Handler], Handler]:
    """Decorates a handler of functions that take their arguments in more than one form.

    Args:
        *functions: torch functions.

    Returns:
        A decorator of ``handler(widening, args, kwargs)``, which returns the arguments to call with.
    """

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def watch_where(condition: Condition) -> Callable[[Handler], Handler]:
    """Decorates a handler of all functions that do a kind of thing, whatever their names, and have no other handler.

    Args:
        condition: whether a function does it, ``condition(function, args, kwargs)``.

    Returns:
        A decorator of ``handler(widening, args, kwargs)``, which returns the arguments to call with.
    """

    def register(handler: Handler) -> Handler:
        _KINDS.append((condition, handler))
        return handler

    return register


def forms(*names: str) -> List[Callable]:
    """Functions of torch in all their forms: as functions, as methods, and in place."""
    return [
        getattr(owner, form)
        for name in names
        for owner, form in ((torch, name), (torch.Tensor, name), (torch.Tensor, f'{name}_'))
        if hasattr(owner, form)
    ]


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


def find_handler(function: Callable, args: Positional, kwargs: Named) -> Optional[Handler]:
    """The handler of a function that is called with some arguments; None if it is not watched."""
    if function in _HANDLERS:
        return _HANDLERS[function]
    return next((handler for condition, handler in _KINDS if condition(function, args, kwargs)), None)


def watched() -> List[Callable]:
    """The functions that have a handler by themselves."""
    return list(_HANDLERS)


def find_stand_in(function: Callable) -> Callable:
    """What to call in the place of a function: itself, unless something stands in for it."""
    return _STAND_INS.get(function, function)


def handle_module(widening: Widening, name: str, module: nn.Module, x: Any) -> None:
    """Lets the handlers of a module's class see it, and its first input, before its forward runs."""
    for module_class, handler in _MODULE_HANDLERS.items():
        if isinstance(module, module_class):
            handler(widening, name, module, x)
