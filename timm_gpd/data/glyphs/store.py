"""The folder of the glyphs: one file of arrays, and one that says what is in it and what it was made of."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any, Dict, Tuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from ...errors import UsageError
from .splits import SPLITS

__all__ = ['ARRAYS', 'DESCRIPTION', 'Glyphs', 'check_free', 'read_description', 'read_glyphs', 'write_folder']

ARRAYS, DESCRIPTION = 'glyphs.safetensors', 'glyphs.json'


@dataclass(frozen=True)
class Glyphs:
    """Images of one split.

    Attributes:
        images: (N, size, size), uint8, white on black.
        targets: (N,), int64, indices of the classes.
        families: (N,), int64, indices of the families.
        numbers: (N,), int64, places of the images among those of all splits.
        classes: the characters, by index.
    """

    images: np.ndarray
    targets: np.ndarray
    families: np.ndarray
    numbers: np.ndarray
    classes: Tuple[str, ...]


def check_free(folder: str) -> None:
    """Checks that a folder can be written.

    Args:
        folder: the folder.

    Raises:
        UsageError: if something of that name exists.
    """
    if os.path.exists(folder):
        raise UsageError(f'{folder} exists: choose another folder')


def write_folder(folder: str, arrays: Dict[str, np.ndarray], description: Dict[str, Any]) -> None:
    """Writes the folder as a whole: whoever is killed while writing leaves none of its name.

    Args:
        folder: the folder, which does not exist.
        arrays: ``images``, ``targets``, ``families`` and ``splits``, each with an entry per image.
        description: what ``glyphs.json`` says; the hash of the arrays is added.

    Raises:
        UsageError: if it cannot be written.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    partial = ''
    try:
        os.makedirs(parent, exist_ok=True)
        partial = tempfile.mkdtemp(prefix='.glyphs-', dir=parent)
        os.chmod(partial, 0o755)
        save_file(arrays, os.path.join(partial, ARRAYS))
        os.chmod(os.path.join(partial, ARRAYS), 0o644)
        with open(os.path.join(partial, ARRAYS), 'rb') as file:
            sha256 = hashlib.sha256(file.read()).hexdigest()
        with open(os.path.join(partial, DESCRIPTION), 'w', encoding='utf-8') as file:
            json.dump({**description, 'arrays_sha256': sha256}, file, indent=1, ensure_ascii=False)
        os.rename(partial, folder)
    except OSError as error:
        raise UsageError(f'cannot write the glyphs to {folder}: {error.strerror}; choose another folder')
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_description(folder: str) -> Dict[str, Any]:
    """What ``glyphs.json`` of a folder says.

    Args:
        folder: from :func:`write_folder`.

    Returns:
        Values by name.

    Raises:
        UsageError: if the folder has none.
    """
    try:
        with open(os.path.join(folder, DESCRIPTION), encoding='utf-8') as file:
            description: Dict[str, Any] = json.load(file)
        if {'classes', 'settings'} <= description.keys():
            return description
    except (OSError, ValueError, AttributeError):  # no such file, no JSON, or no mapping
        pass
    raise UsageError(f'{folder} holds no glyphs: write them with python -m timm_gpd.data.glyphs {folder}')


def read_glyphs(folder: str, split: str) -> Glyphs:
    """Reads a split.

    Args:
        folder: what ``python -m timm_gpd.data.glyphs`` wrote.
        split: one of :data:`SPLITS`.

    Returns:
        Its images.

    Raises:
        UsageError: if the folder has no glyphs, or they are damaged.
    """
    description, path = read_description(folder), os.path.join(folder, ARRAYS)
    try:
        with open(path, 'rb') as file:
            content = file.read()
        arrays = load(content)
    except (OSError, SafetensorError) as error:
        raise UsageError(f'{path} cannot be read: write the glyphs again ({error})')
    if hashlib.sha256(content).hexdigest() != description.get('arrays_sha256'):
        raise UsageError(f'{path} is not what {DESCRIPTION} describes: write the glyphs again')
    numbers = np.flatnonzero(arrays['splits'] == SPLITS.index(split))
    return Glyphs(
        arrays['images'][numbers],
        arrays['targets'][numbers],
        arrays['families'][numbers],
        numbers,
        tuple(description['classes']),
    )
