"""Families for training, for choosing what to train with, and for testing."""

import hashlib
from fractions import Fraction
from typing import Dict, List, Optional, Sequence

from ...errors import UsageError

__all__ = ['SPLITS', 'split_families']

SPLITS = ('train', 'validation', 'test')


def split_families(
    names: Sequence[str],
    seed: int,
    test_share: Fraction,
    validation_share: Fraction,
    count: Optional[int] = None,
) -> Dict[str, str]:
    """Deals families to splits. None is in two.

    The order is that of a hash of seed and name, so a family that is added or lost moves few others.

    Args:
        names: the families.
        seed: another one gives another deal.
        test_share: share of the families that test.
        validation_share: share of the others that validate.
        count: families to deal; by default all.

    Returns:
        The split of each family, by name.

    Raises:
        UsageError: if there are fewer families than asked for, or too few for three splits.
    """
    if count is not None and count > len(names):
        raise UsageError(f'{len(names)} families can be used, and --families asks for {count}: install more fonts')
    order: List[str] = sorted(names, key=lambda name: hashlib.sha256(f'{seed} {name}'.encode()).digest())[:count]
    test = max(1, round(len(order) * test_share))
    validation = max(1, round((len(order) - test) * validation_share))
    if len(order) - test - validation < 1:
        raise UsageError(
            f'{len(order)} families do not fill the splits {", ".join(SPLITS)}: install more fonts, or lower '
            '--test-share and --validation-share'
        )
    return {
        name: 'test' if place < test else 'validation' if place < test + validation else 'train'
        for place, name in enumerate(order)
    }
