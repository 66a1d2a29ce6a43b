"""Real images without a download: scikit-learn's handwritten digits as an image folder."""

import os
import random
import shutil
import tempfile

import numpy as np

from ...errors import UsageError

__all__ = ['write_digits']

NUM_CLASSES = 10


def write_digits(data_dir: str, train_size: int, seed: int) -> str:
    """Writes the digits once as ``<data_dir>/digits-<train_size>-<seed>/<split>/<class>/<index>.png``.

    The 1,797 grayscale images of 8x8 pixels come from UCI's "Optical Recognition of Handwritten Digits" test set. Half
    of them are the split ``test``, the same for every seed and size: what is tuned on ``validation`` of any draw has
    not seen them.

    Args:
        data_dir: folder that the image folder goes into.
        train_size: images of the split ``train``, stratified over the ten classes; the others of its half are
            ``validation``.
        seed: seed that chooses them.

    Returns:
        The image folder. One that is already there is used as it is.

    Raises:
        UsageError: if scikit-learn is missing or ``train_size`` leaves a class without images.
    """
    folder = os.path.join(data_dir, f'digits-{train_size}-{seed}')
    if os.path.isdir(folder):
        return folder
    state = random.getstate()
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UsageError('--dataset digits needs scikit-learn: pip install "timm-gpd[demo]"')
    finally:
        random.setstate(state)  # that import may draw: a run that writes the digits is the same as one that finds them
    from PIL import Image

    digits = load_digits()
    everything = np.arange(len(digits.target))
    others, test = train_test_split(everything, test_size=0.5, stratify=digits.target, random_state=0)
    most = len(others) - NUM_CLASSES
    if not NUM_CLASSES <= train_size <= most:
        raise UsageError(f'--digits-train-size must be between {NUM_CLASSES} and {most}, but is {train_size}')
    train, validation = train_test_split(
        others, train_size=train_size, stratify=digits.target[others], random_state=seed
    )
    try:
        os.makedirs(data_dir, exist_ok=True)
        partial = tempfile.mkdtemp(prefix='.digits-', dir=data_dir)
    except OSError as error:
        raise UsageError(f'cannot write the digits to {data_dir}: {error.strerror}; choose another --data-dir')
    for split, indices in (('train', train), ('validation', validation), ('test', test)):
        for index in indices:
            class_dir = os.path.join(partial, split, str(digits.target[index]))
            os.makedirs(class_dir, exist_ok=True)
            pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(class_dir, f'{index:04d}.png'))
    try:
        os.rename(partial, folder)  # complete or not there at all
    except OSError:
        shutil.rmtree(partial)  # another run was faster
    return folder
