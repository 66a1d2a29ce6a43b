"""Fetches a student."""

import os
import shutil
from typing import Optional

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from ..errors import UsageError
from ..student_folder import STUDENT_FILES, new_folder
from ..version import __version__
from .client import LIBRARY, create_api, hub_errors
from .folders import check_free, check_student

__all__ = ['pull']


def pull(repo_id: str, folder: str, revision: Optional[str] = None) -> None:
    """Downloads a student's folder, through the cache of huggingface_hub.

    Args:
        repo_id: ``namespace/name``.
        folder: where to write; empty or not there.
        revision: branch, tag or commit; default ``main``.

    Raises:
        UsageError: if the folder is in use, the repo cannot be read or holds no student, or a file arrived damaged.
    """
    check_free(folder)
    with hub_errors(repo_id, revision):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(STUDENT_FILES),
            library_name=LIBRARY,
            library_version=__version__,
        )
        _discard_damaged(repo_id, snapshot)
    check_student(snapshot, repo_id)
    with new_folder(folder) as partial:
        for name in STUDENT_FILES:
            if os.path.isfile(os.path.join(snapshot, name)):
                shutil.copyfile(os.path.join(snapshot, name), os.path.join(partial, name))


def _discard_damaged(repo_id: str, snapshot: str) -> None:
    """Compares what was downloaded with the Hub's checksums; what differs leaves the cache."""
    try:
        report = create_api().verify_repo_checksums(repo_id, revision=os.path.basename(snapshot))
    except (HTTPError, OfflineModeIsEnabled):
        return  # the snapshot came from the cache, and was compared when it came there
    damaged = [mismatch['path'] for mismatch in report.mismatches]
    for path in (os.path.join(snapshot, name) for name in damaged):
        os.remove(os.path.realpath(path))
        if os.path.lexists(path):
            os.remove(path)
    if damaged:
        raise UsageError(f'{", ".join(damaged)} of {repo_id} arrived damaged and was removed from the cache: try again')
