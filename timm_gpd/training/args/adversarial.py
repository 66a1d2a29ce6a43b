"""Flags of attacks: in training and in validation."""

import argparse

from ...task.attack import ATTACKS

__all__ = ['add_adversary', 'add_attack', 'fraction']


def fraction(text: str) -> float:
    """Reads a number, or one over another, as in ``8/255``.

    Raises:
        ValueError: if it is neither.
    """
    above, slash, below = str(text).partition('/')
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{text!r} is neither a number nor one over another, as in 8/255')


def add_adversary(parser: argparse.ArgumentParser) -> None:
    """Flags of adversarial training."""
    group = parser.add_argument_group('Adversarial training')
    group.add_argument(
        '--adv', default=None, choices=ATTACKS, help='train on images that this attack on the student has perturbed'
    )
    _add_strength(group)


def add_attack(parser: argparse.ArgumentParser) -> None:
    """Flags of validation under attack."""
    group = parser.add_argument_group('Attack')
    group.add_argument('--adv', default=None, choices=ATTACKS, help='also validate on images that this has perturbed')
    _add_strength(group)
    group.add_argument(
        '--adv-package',
        default=None,
        choices=['torchattacks', 'autoattack'],
        help='attack with this package, where it is installed: its PGD or FGSM, or the whole of AutoAttack',
    )


def _add_strength(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--adv-eps', type=fraction, default=8 / 255, metavar='E', help='how far a pixel of 0 to 1 may move'
    )
    group.add_argument('--adv-step', type=fraction, default=2 / 255, metavar='E', help='length of a step of pgd')
    group.add_argument('--adv-steps', type=int, default=10, metavar='N', help='how many steps pgd takes')
