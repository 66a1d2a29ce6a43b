"""The epochs of ``--gpd-epochs`` in which student and dynamic teacher train together."""

import re
from typing import Optional

from ..errors import UsageError

__all__ = ['read_joint_epochs', 'what_is_wrong']

_FORM = 'must be A-B, joint training from epoch A to before epoch B as in 0-30, or shares of the epochs as in 0.5-1.0'


def what_is_wrong(text: str) -> Optional[str]:
    """What is wrong with a window of epochs by itself, None where nothing is.

    Args:
        text: ``A-B``. Where one of the two has a decimal point, both are shares of the epochs.
    """
    found = re.fullmatch(r'(\d+(?:\.\d*)?|\.\d+)-(\d+(?:\.\d*)?|\.\d+)', text)
    if found is None:
        return f'{_FORM}, but is {text}'
    first, end = float(found[1]), float(found[2])
    if '.' in text and end > 1:
        return f'{text} has a decimal point, so both are shares, and {end:g} is above 1'
    return None if first < end else f'{text} holds no epoch: the second must be above the first'


def read_joint_epochs(text: Optional[str], num_epochs: int) -> range:
    """The epochs that a window holds.

    Args:
        text: a window in which :func:`what_is_wrong` finds nothing, or None for all epochs.
        num_epochs: epochs of the whole schedule, of which shares are.

    Returns:
        Indices of epochs, from 0: of ``A-B`` those from A to B - 1.

    Raises:
        UsageError: if it holds no epoch of the schedule, or ends behind it.
    """
    if text is None:
        return range(num_epochs)
    first, end = (float(number) for number in text.split('-'))
    if '.' in text:
        first, end = round(first * num_epochs), round(end * num_epochs)
    if end > num_epochs:
        raise UsageError(f'--gpd-epochs {text} ends behind the {num_epochs} epochs of the schedule: lower it')
    if first == end:
        raise UsageError(f'--gpd-epochs {text} holds none of the {num_epochs} epochs of the schedule: widen it')
    return range(int(first), int(end))
