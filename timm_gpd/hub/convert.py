"""Turns a checkpoint of the paper's authors into a student's folder."""

import os

import timm

from ..errors import UsageError, usage_errors
from ..models.releases import RELEASES, convert_checkpoint
from ..student_folder import save_student
from .folders import check_free

__all__ = ['convert']


def convert(path: str, folder: str) -> None:
    """Turns a checkpoint of the paper's authors into a student's folder.

    Args:
        path: their ``.pth.tar``.
        folder: where to write; empty or not there.

    Raises:
        UsageError: if the folder is in use, or the file is missing or not one of theirs.
    """
    if not os.path.isfile(path):
        raise UsageError(f'checkpoint {path} does not exist')
    check_free(folder)
    with usage_errors("give a checkpoint of the authors' repository, guoyongcs/GPD"):
        arch, state_dict = convert_checkpoint(path)
        # The variant's config tells how the authors evaluate, and the release which activation they use.
        model_args = dict(RELEASES[arch].model_args)
        classifier = timm.get_pretrained_cfg_value(f'{arch}_gpd', 'classifier')
        num_classes = len(state_dict[f'{classifier}.bias'])
        student = timm.create_model(f'{arch}_gpd', num_classes=num_classes, **model_args)
        student.load_state_dict(state_dict)
    save_student(
        student, folder, dict(model=arch, model_kwargs=model_args, gpd=True, converted_from=os.path.basename(path))
    )
