"""Flags of timm's scripts that these programs know and do not do, with the reason."""

import argparse
from typing import Any, Dict, NoReturn, Tuple

from ...errors import UsageError

__all__ = ['TRAIN_REFUSED', 'VALIDATE_REFUSED', 'Refused', 'add_refused']

_NAFLEX = 'a plan is made for images of one shape, and NaFlex batches are sequences of patches'
_TORCHSCRIPT = 'TorchScript knows no parametrized modules, and torch has deprecated it: use --torchcompile'
_FUSER = 'it chooses how TorchScript fuses, and nothing is scripted: use --torchcompile'

# By flag: timm's default, which a configuration may name, and the reason.
_BOTH: Dict[str, Tuple[Any, str]] = {
    '--torchscript': (False, _TORCHSCRIPT),
    '--fuser': ('', _FUSER),
    '--naflex-loader': (False, _NAFLEX),
    '--naflex-max-seq-len': (576, _NAFLEX),
}
TRAIN_REFUSED: Dict[str, Tuple[Any, str]] = {
    **_BOTH,
    '--naflex-train-seq-lens': ([128, 256, 576, 784, 1024], _NAFLEX),
    '--naflex-patch-sizes': (None, _NAFLEX),
    '--naflex-patch-size-probs': (None, _NAFLEX),
    '--naflex-loss-scale': ('linear', _NAFLEX),
    '--naflex-patchify-channels-first': (False, _NAFLEX),
    '--drop-connect': (None, 'timm does nothing with it: use --drop-path'),
    '--tta': (0, "timm's loaders make no batches of several views of an image, which it would average"),
}
VALIDATE_REFUSED: Dict[str, Tuple[Any, str]] = {
    **_BOTH,
    '--aot-autograd': (False, 'its fusion is by TorchScript, which torch has deprecated: use --torchcompile aot_eager'),
    '--tf-preprocessing': (False, 'it is for comparing ported weights with TensorFlow, which nothing here needs'),
}


class Refused(argparse.Action):
    """An argument whose use is answered with the reason against it.

    Attributes:
        timm_default: the value of it that changes nothing.
        reason: why there is no other.
    """

    def __init__(self, option_strings: Any, dest: str, timm_default: Any, reason: str) -> None:
        super().__init__(option_strings, dest, nargs='*', default=argparse.SUPPRESS, help=reason)
        self.timm_default, self.reason = timm_default, reason

    def __call__(self, *_: Any) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        raise UsageError(f'{self.option_strings[0]} is not supported: {self.reason}')


def add_refused(parser: argparse.ArgumentParser, flags: Dict[str, Tuple[Any, str]]) -> None:
    """Makes a parser answer flags with the reason why there is no such thing."""
    group = parser.add_argument_group("Not supported, of timm's")
    for flag, (timm_default, reason) in flags.items():
        group.add_argument(flag, action=Refused, timm_default=timm_default, reason=reason)
