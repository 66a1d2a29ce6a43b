"""The command line of ``python -m timm_gpd.data.glyphs``."""

import argparse
import hashlib
import json
from collections import Counter
from fractions import Fraction
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import PIL
from PIL import features

from ...command_line import Parser, run_program
from ...errors import UsageError
from .classes import CLASSES
from .families import Family, choose_families
from .fonts import choose_faces, find_font_files
from .splits import SPLITS, split_families
from .store import check_free, write_folder

__all__ = ['main', 'write_glyphs']

EPILOG = 'exit codes: 0 done, 2 bad input (one line says what to do; nothing was overwritten), 1 anything else'


def write_glyphs(
    folder: str,
    fonts: Sequence[str] = (),
    size: int = 28,
    families: Optional[int] = None,
    seed: int = 0,
    test_share: Fraction = Fraction(2, 5),
    validation_share: Fraction = Fraction(1, 10),
    min_share: Fraction = Fraction(2, 5),
) -> Dict[str, Any]:
    """Draws the glyphs of all families of fonts, and writes them as ``glyphs.safetensors`` and ``glyphs.json``.

    The same fonts, arguments and versions of Pillow and FreeType give the same bytes.

    Args:
        folder: folder to write, which does not exist.
        fonts: folders of fonts; by default all fonts of the machine, see :func:`find_font_files`.
        size: side of an image in pixels.
        families: how many families to take, chosen by ``seed``; by default all.
        seed: deals families to splits.
        test_share: share of the families that test.
        validation_share: share of the others that validate.
        min_share: share of the classes that a face has at least.

    Returns:
        What ``glyphs.json`` says.

    Raises:
        UsageError: if the folder exists or cannot be written, or there are too few fonts.
    """
    check_free(folder)
    usable, left_out = choose_families(choose_faces(find_font_files(fonts)), size, float(min_share))
    splits = split_families([family.name for family in usable], seed, test_share, validation_share, families)
    chosen = [family for family in usable if family.name in splits]
    settings = dict(
        size=size,
        families=families,
        seed=seed,
        test_share=str(test_share),
        validation_share=str(validation_share),
        min_share=str(min_share),
    )
    made_of = dict(
        settings=settings,
        versions=dict(pillow=PIL.__version__, freetype=features.version('freetype2')),
        classes=list(CLASSES),
        families=[_describe(family, splits[family.name]) for family in chosen],
    )
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    write_folder(folder, _arrays(chosen, splits), dict(digest=digest, **made_of, left_out=left_out))
    return dict(digest=digest, **made_of, left_out=left_out)


def _describe(family: Family, split: str) -> Dict[str, Any]:
    faces = [
        dict(style=drawn.face.style, index=drawn.face.index, sha256=drawn.face.sha256, images=len(drawn.images))
        for drawn in family.faces
    ]
    return dict(name=family.name, split=split, images=sum(face['images'] for face in faces), faces=faces)


def _arrays(families: List[Family], splits: Dict[str, str]) -> Dict[str, np.ndarray]:
    rows = [
        (image, target, number, SPLITS.index(splits[family.name]))
        for number, family in enumerate(families)
        for drawn in family.faces
        for target, image in drawn.images.items()
    ]
    images, targets, numbers, of_splits = zip(*rows)
    return dict(
        images=np.stack(images),
        targets=np.array(targets, np.int64),
        families=np.array(numbers, np.int64),
        splits=np.array(of_splits, np.uint8),
    )


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text} is no share: give one as in 1/3 or 0.25')
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
    return share


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='python -m timm_gpd.data.glyphs',
        description='Draw characters in all families of fonts of this machine, for --dataset glyphs.',
        epilog=EPILOG,
    )
    parser.add_argument('folder', metavar='OUT', help='folder to write, which does not exist')
    parser.add_argument(
        '--fonts', nargs='+', default=[], metavar='DIR', help='folders of fonts (default: all fonts of this machine)'
    )
    parser.add_argument('--size', type=int, default=28, metavar='N', help='side of an image in pixels (default: 28)')
    parser.add_argument('--families', type=int, metavar='N', help='families to take, chosen by --seed (default: all)')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='deals families to splits (default: 0)')
    for name, default, help in (
        ('test', '2/5', 'share of the families that test'),
        ('validation', '1/10', 'share of the others that validate'),
        ('min', '2/5', 'share of the classes that a face has at least'),
    ):
        parser.add_argument(
            f'--{name}-share',
            type=_share,
            default=Fraction(default),
            metavar='SHARE',
            help=f'{help} (default: {default})',
        )
    return parser


def _run_command(argv: Optional[List[str]]) -> None:
    args = _parser().parse_args(argv)
    for name, low, high in (('size', 8, 256), ('families', 3, None), ('seed', 0, None)):
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            raise UsageError(f'--{name} must be at least {low}{f" and at most {high}" if high else ""}, but is {value}')
    written = write_glyphs(**vars(args))
    for split in SPLITS:
        of_split = [family for family in written['families'] if family['split'] == split]
        print(f'{split}: {sum(family["images"] for family in of_split)} images of {len(of_split)} families')
    known = {'letters': 'another one has their letters', 'pictures': 'pictures'}
    reasons = Counter(known.get(why.split()[0], 'too few characters') for why in written['left_out'].values())
    for reason, count in sorted(reasons.items()):
        print(f'left out: {count} families ({reason})')
    print(f'{len(CLASSES)} classes, digest {written["digest"]}')


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command.

    Args:
        argv: its command line, without the program's name; default that of this process.

    Returns:
        The exit code: 0 done, 2 for what the user has to change.
    """
    return run_program('timm_gpd.data.glyphs', lambda: _run_command(argv))
