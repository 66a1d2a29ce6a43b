"""Image folders: where a split is, and which classes its sub-folders are."""

import logging
import os
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from timm.data import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.utils import natural_key

from ...errors import UsageError, first_of, usage_errors

__all__ = [
    'EVAL_NAMES',
    'TRAIN_NAMES',
    'ClassFolders',
    'find_split',
    'find_training_split',
    'number_classes',
    'read_class_map',
    'scan_split',
]

_logger = logging.getLogger('train')

# What timm takes for one another, in the order in which it looks for them.
TRAIN_NAMES = ('train', 'training')
EVAL_NAMES = ('val', 'valid', 'validation', 'eval', 'evaluation')


@dataclass(frozen=True)
class ClassFolders:
    """What the folder of a split holds.

    Attributes:
        folder: the folder.
        classes: names of the folders with images, in timm's order: '' where images lie outside of any.
        empty: paths of the folders with neither images nor folders, relative to the folder.
    """

    folder: str
    classes: Tuple[str, ...]
    empty: Tuple[str, ...]


def find_split(root: str, split: str, alone: bool) -> str:
    """The folder of a split: one of that name, or of a name that timm takes for the same.

    Args:
        root: folder of the dataset.
        split: name of the split.
        alone: whether no other split is read. Then ``root`` may be the split itself, as in
            ``validate.py imagenet/validation``.

    Returns:
        Its path.

    Raises:
        UsageError: if there is none. timm would read all of ``root``, other splits included.
    """
    if '[' in split:
        raise UsageError(f'{split!r} is a part of a split, and an image folder has whole ones: name one of its folders')
    synonyms = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), ())
    for name in (split, *synonyms):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if alone and synonyms and not {*TRAIN_NAMES, *EVAL_NAMES, 'test'} & set(folders):
        _logger.info(f'{root} has no folder of the split {split}: its own folders are taken for the classes')
        return root
    found = first_of(folders) if folders else 'no folder'
    raise UsageError(f'{root} has no folder of the split {split!r}: it has {found} (check the names of the splits)')


def find_training_split(split: ClassFolders) -> Optional[str]:
    """The folder of the training split beside that of another one, where it has other classes.

    Args:
        split: what the folder of a split for validation holds.

    Returns:
        Its path; None where there is none, or it has folders of the same classes, which are numbered alike.
    """
    parent, name = os.path.split(os.path.abspath(split.folder))
    if name not in (*EVAL_NAMES, 'test'):
        return None
    for folder in (os.path.join(parent, name) for name in TRAIN_NAMES):
        if os.path.isdir(folder):
            found = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
            return None if found == set(split.classes) else folder
    return None


def scan_split(folder: str, extensions: Sequence[str] = ()) -> ClassFolders:
    """Finds the classes that timm's reader of image folders finds: folders at any depth that hold images.

    Args:
        folder: folder of a split.
        extensions: of files that are images, in lower case; none for those that timm knows.
    """
    types = set(extensions or get_img_extensions())
    paths: Dict[str, List[str]] = {}
    empty = []
    for path, folders, files in os.walk(folder, followlinks=True):
        if any(os.path.splitext(name)[1].lower() in types for name in files):
            name = '' if path == folder else os.path.basename(path)
            paths.setdefault(name, []).append(os.path.relpath(path, folder))
        elif not folders and path != folder and not os.path.basename(path).startswith('.'):  # .ipynb_checkpoints
            empty.append(os.path.relpath(path, folder))
    for name, several in paths.items():
        if len(several) > 1:
            _logger.warning(
                f"{folder}: {first_of(several)} are one class, {name!r}: classes go by a folder's last name"
            )
    return ClassFolders(folder, tuple(sorted(paths, key=natural_key)), tuple(sorted(empty)))


def number_classes(splits: Mapping[str, ClassFolders], class_map: Mapping[str, int]) -> Dict[str, int]:
    """The index of each class, the same in every split.

    timm numbers the folders of each split for itself, so that one that is missing moves all that follow.

    Args:
        splits: what the folders hold, by name of the split; the first one numbers the classes of all.
        class_map: indices by name, where they were given.

    Returns:
        Indices by name.

    Raises:
        UsageError: if a split has images of a class that the first one, or the map, lacks; or an empty folder.
    """
    first = next(iter(splits.values()))
    indices = dict(class_map) or {name: index for index, name in enumerate(first.classes)}
    owner = 'the class map' if class_map else first.folder
    for split in splits.values():
        empty = [path for path in split.empty if not class_map or os.path.basename(path) in class_map]
        if empty:
            raise UsageError(
                f'{split.folder} has folders without images that timm reads: {first_of(empty)}: '
                'remove them or fill them'
            )
        if not split.classes:
            raise UsageError(
                f'Found 0 images in {split.folder} (timm reads files that end in {", ".join(get_img_extensions())})'
            )
        unknown = [name for name in split.classes if name not in indices]
        if '' in unknown or (not class_map and '' in split.classes):
            raise UsageError(
                f'{split.folder} has images outside of class folders: put them into a folder of their class'
            )
        if unknown:
            raise UsageError(f'{split.folder} has classes that {owner} lacks: {first_of(unknown)}')
        missing = [name for name in indices if name not in split.classes]
        if missing:
            _logger.warning(
                f'{split.folder} has no images of {len(missing)} of {len(indices)} classes: {first_of(missing)}'
            )
    return indices


def read_class_map(path: str, root: str) -> Dict[str, int]:
    """Reads ``--class-map``.

    Args:
        path: a text file of names, one a line, or a pickled dictionary of names and indices; as in timm also relative
            to ``root``.
        root: folder of a split.

    Raises:
        UsageError: if it is missing, cannot be read, or is no such map.
    """
    with usage_errors('check --class-map', Exception):
        class_map = load_class_map(path, root)
    if '' in class_map:
        raise UsageError(f'the class map {path} has an empty line')
    wrong = [name for name, index in class_map.items() if not isinstance(index, int) or index < 0]
    if wrong or not class_map:
        raise UsageError(
            f'the class map {path} has no index for {first_of(wrong)}' if wrong else f'{path} has no classes'
        )
    return class_map
