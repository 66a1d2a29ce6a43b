"""Publishes a student."""

import os
import tempfile
from typing import Any, Dict, Optional, Union

import yaml
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UsageError, usage_errors
from ..student_folder import CARD, PLOT, STUDENT_FILES, card_of_repo, read_metrics, save_student
from ..training.args import Arguments, train_parser
from ..training.checkpoints import read_checkpoint
from ..training.student import create_student, resolve_input, set_input
from ..version import __version__
from .client import create_api, hub_errors
from .folders import check_student

__all__ = ['push']


def push(
    source: str,
    repo_id: str,
    private: bool = False,
    revision: Optional[str] = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> str:
    """Publishes a student: all of its files in one commit, so that an interrupted push leaves the repo as it was.

    Args:
        source: folder of a run, a student's folder, or a training checkpoint.
        repo_id: ``namespace/name``; made if it is not there.
        private: make it private.
        revision: branch to commit to, made if it is not there; default ``main``.
        create_pr: open a pull request against ``main`` instead.
        dry_run: contact nothing.

    Returns:
        What to print: the URL of the repo, branch or pull request, or what would be uploaded.

    Raises:
        UsageError: if the source is no student, or the Hub refuses or cannot be reached.
    """
    with usage_errors('name the repo as in --repo-id me/resnet18_gpd.digits', HFValidationError):
        validate_repo_id(repo_id)
    if create_pr and revision:
        raise UsageError('--create-pr opens a pull request against main: leave out --revision')
    with tempfile.TemporaryDirectory() as scratch:
        folder = _student_folder(source, scratch)
        contents: Dict[str, Union[str, bytes]] = {
            name: os.path.join(folder, name) for name in STUDENT_FILES if os.path.isfile(os.path.join(folder, name))
        }
        contents[CARD] = card_of_repo(folder, repo_id).encode()
        if dry_run:
            sizes = {
                name: len(content) if isinstance(content, bytes) else os.path.getsize(content)
                for name, content in contents.items()
            }
            lines = [f'  {name} ({size:,} bytes)' for name, size in sizes.items()]
            return '\n'.join([f'Would upload to {repo_id}:', *lines])
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api = create_api()
        with hub_errors(repo_id, revision):
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise UsageError(
                    f'{repo_id} exists and is public: make it private in its settings, or leave out --private'
                )
            if revision:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            # Not upload_folder: with Xet it may split a folder into several commits.
            commit = api.create_commit(
                url.repo_id,
                operations,
                commit_message=f'Upload student with timm-gpd {__version__}',
                revision=revision,
                create_pr=create_pr,
            )
    return commit.pr_url or (f'{url}/tree/{revision}' if revision else str(url))


def _student_folder(source: str, scratch: str) -> str:
    """The student's folder inside a run or at ``source`` itself; one made in ``scratch`` for a checkpoint."""
    if os.path.isfile(source):
        folder = os.path.join(scratch, 'student')
        _save_student_of_checkpoint(source, folder)
        return folder
    if not os.path.isdir(source):
        raise UsageError(f"{source} does not exist: give the folder of a run, a student's folder or a checkpoint")
    if not os.path.isfile(os.path.join(source, 'args.yaml')):
        check_student(source, source)
        return source
    folder = os.path.join(source, 'student')
    if not os.path.isdir(folder):
        raise UsageError(f'{source} holds no student, as its run did not finish: give one of its checkpoints')
    check_student(folder, folder)
    return folder


def _save_student_of_checkpoint(path: str, folder: str) -> None:
    """Writes the student of a training checkpoint: the averaged one where there is one, which is the one validated."""
    try:
        checkpoint = read_checkpoint(path)
    except UsageError as error:
        raise UsageError(f'{error} (give a checkpoint of train.py)') from error
    if not {'args', 'epoch', 'state_dict'} <= checkpoint.keys():
        raise UsageError(f'{path} is no checkpoint of train.py: it lacks args, epoch or state_dict')
    # Its own weights follow: what the run started from is neither needed nor always there.
    # Flags that are newer than the checkpoint have their defaults.
    args = Arguments(
        **{
            **vars(train_parser().parse_args([])),
            **vars(checkpoint['args']),
            **dict(pretrained=False, pretrained_path=None, initial_checkpoint=''),
        }
    )
    student = create_student(args)
    set_input(student, resolve_input(args, student))
    with usage_errors('give a checkpoint of train.py', RuntimeError):
        student.load_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
    run = os.path.dirname(os.path.abspath(path))
    recipe = _recipe_of_run(run) or dict(vars(checkpoint['args']))
    metrics = read_metrics(os.path.join(run, 'summary.csv'), checkpoint['epoch'])
    save_student(student, folder, recipe, metrics, os.path.join(run, PLOT))


def _recipe_of_run(run: str) -> Dict[str, Any]:
    """The command as it was given. Checkpoints of version 0.1.0 hold the arguments after the data was found."""
    path = os.path.join(run, 'args.yaml')
    if not os.path.isfile(path):
        return {}
    with open(path) as file, usage_errors(f'{path} is damaged', yaml.YAMLError):
        recipe = yaml.safe_load(file) or {}
    recipe.pop('versions', None)
    return recipe
