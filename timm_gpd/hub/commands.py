"""Students on the Hugging Face Hub: ``python -m timm_gpd.hub push | pull | convert``; ``--help`` explains each."""
import argparse
import os
import pickle
import shutil
import tempfile
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import timm
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    RepositoryNotFoundError, RevisionNotFoundError)
from huggingface_hub.utils import validate_repo_id

from ..command_line import Parser, run_program
from ..errors import UsageError, usage_errors
from ..student_folder.folder import (
    CARD, CONFIG, PLOT, STUDENT_FILES, WEIGHTS, card_of_repo, new_folder, read_metrics, save_student)
from ..training.build import create_student, resolve_input
from ..version import __version__

__all__ = ['convert', 'pull', 'push']

_LIBRARY = dict(library_name='timm-gpd', library_version=__version__)
_EPILOG = (
    'exit codes: 0 done, 2 bad input, a refused token, or a Hub that cannot be reached (one line says what to do), '
    '1 anything else. HF_TOKEN or `hf auth login` gives the token, HF_ENDPOINT the server, HF_HUB_CACHE the folder of '
    'what was downloaded; HF_HUB_OFFLINE=1 uses only what is there.')


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
        contents = {name: os.path.join(folder, name) for name in STUDENT_FILES
                    if os.path.isfile(os.path.join(folder, name))}
        contents[CARD] = card_of_repo(folder, repo_id).encode()
        if dry_run:
            sizes = {name: len(content) if isinstance(content, bytes) else os.path.getsize(content)
                     for name, content in contents.items()}
            lines = [f'  {name} ({size:,} bytes)' for name, size in sizes.items()]
            return '\n'.join([f'Would upload to {repo_id}:', *lines])
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api = HfApi(**_LIBRARY)
        with _hub_errors(repo_id, revision):
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise UsageError(
                    f'{repo_id} exists and is public: make it private in its settings, or leave out --private')
            if revision:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            # Not upload_folder: with Xet it may split a folder into several commits.
            commit = api.create_commit(
                url.repo_id, operations, commit_message=f'Upload student with timm-gpd {__version__}',
                revision=revision, create_pr=create_pr)
    return commit.pr_url or (f'{url}/tree/{revision}' if revision else str(url))


def pull(repo_id: str, folder: str, revision: Optional[str] = None) -> None:
    """Downloads a student's folder, through the cache of huggingface_hub.

    Args:
        repo_id: ``namespace/name``.
        folder: where to write; empty or not there.
        revision: branch, tag or commit; default ``main``.

    Raises:
        UsageError: if the folder is in use, the repo cannot be read or holds no student, or a file arrived damaged.
    """
    _check_free(folder)
    with _hub_errors(repo_id, revision):
        snapshot = snapshot_download(repo_id, revision=revision, allow_patterns=list(STUDENT_FILES), **_LIBRARY)
        _discard_damaged(repo_id, snapshot)
    with usage_errors('choose a repo that timm or timm-gpd published', UsageError):
        _check_student_folder(snapshot, repo_id)
    with new_folder(folder) as partial:
        for name in STUDENT_FILES:
            if os.path.isfile(os.path.join(snapshot, name)):
                shutil.copyfile(os.path.join(snapshot, name), os.path.join(partial, name))


def convert(path: str, folder: str) -> None:
    """Turns a checkpoint of the paper's authors into a student's folder.

    Args:
        path: their ``.pth.tar``.
        folder: where to write; empty or not there.

    Raises:
        UsageError: if the folder is in use, or the file is missing or not one of theirs.
    """
    from ..models.releases import RELEASES, convert_checkpoint
    if not os.path.isfile(path):
        raise UsageError(f'checkpoint {path} does not exist')
    _check_free(folder)
    with usage_errors('give a checkpoint of the authors\' repository, guoyongcs/GPD', ValueError, RuntimeError, OSError,
                      KeyError, pickle.UnpicklingError, EOFError):
        arch, state_dict = convert_checkpoint(path)
        # The variant's config tells how the authors evaluate, and the release which activation they use.
        cfg, model_args = timm.get_pretrained_cfg(f'{arch}_gpd'), RELEASES[arch].model_args
        classes = len(state_dict[f'{cfg.classifier}.bias'])
        student = timm.create_model(f'{arch}_gpd', num_classes=classes, **model_args)
        student.load_state_dict(state_dict)
    save_student(student, folder, dict(
        model=arch, model_kwargs=model_args, gpd=True, converted_from=os.path.basename(path)))


def _student_folder(source: str, scratch: str) -> str:
    """The student's folder inside a run or at ``source`` itself; one made in ``scratch`` for a checkpoint."""
    if os.path.isfile(source):
        folder = os.path.join(scratch, 'student')
        _save_student_of_checkpoint(source, folder)
        return folder
    if not os.path.isdir(source):
        raise UsageError(f'{source} does not exist: give the folder of a run, a student\'s folder or a checkpoint')
    if not os.path.isfile(os.path.join(source, 'args.yaml')):
        _check_student_folder(source, source)
        return source
    folder = os.path.join(source, 'student')
    if not os.path.isdir(folder):
        raise UsageError(f'{source} holds no student, as its run did not finish: give one of its checkpoints')
    _check_student_folder(folder, folder)
    return folder


def _check_student_folder(folder: str, name: str) -> None:
    missing = [file for file in (WEIGHTS, CONFIG, CARD) if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise UsageError(f'{name} is no student: it has no {" and no ".join(missing)}')


def _check_free(folder: str) -> None:
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UsageError(f'{folder} exists: choose another folder')


def _save_student_of_checkpoint(path: str, folder: str) -> None:
    """Writes the student of a training checkpoint: the averaged one where there is one, which is the one validated."""
    with usage_errors('give a checkpoint of train.py', pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        with torch.serialization.safe_globals([argparse.Namespace]):  # what timm saves beside tensors and numbers
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(checkpoint, dict) or not {'args', 'epoch', 'state_dict'} <= checkpoint.keys():
        raise UsageError(f'{path} is no checkpoint of train.py: it lacks args, epoch or state_dict')
    # Its own weights follow: what the run started from is neither needed nor always there.
    args = argparse.Namespace(**{
        **vars(checkpoint['args']), 'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': ''})
    with usage_errors('give a checkpoint of train.py', RuntimeError, AttributeError):
        student = create_student(args)
        resolve_input(args, student)
        student.load_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
    run = os.path.dirname(os.path.abspath(path))
    recipe = _recipe_of_run(run) or vars(checkpoint['args'])
    metrics = read_metrics(os.path.join(run, 'summary.csv'), checkpoint['epoch'])
    save_student(student, folder, recipe, metrics, os.path.join(run, PLOT))


def _recipe_of_run(run: str) -> Dict[str, Any]:
    """What the user asked for; a checkpoint's own arguments are those after the data was prepared."""
    path = os.path.join(run, 'args.yaml')
    if not os.path.isfile(path):
        return {}
    with open(path) as file, usage_errors(f'{path} is damaged', yaml.YAMLError):
        recipe = yaml.safe_load(file) or {}
    recipe.pop('versions', None)
    return recipe


def _discard_damaged(repo_id: str, snapshot: str) -> None:
    """Compares what was downloaded with the Hub's checksums; what differs leaves the cache."""
    try:
        report = HfApi(**_LIBRARY).verify_repo_checksums(repo_id, revision=os.path.basename(snapshot))
    except (HTTPError, OfflineModeIsEnabled):
        return  # the snapshot came from the cache, and was compared when it came there
    damaged = [mismatch['path'] for mismatch in report.mismatches]
    for path in (os.path.join(snapshot, name) for name in damaged):
        os.remove(os.path.realpath(path))
        if os.path.lexists(path):
            os.remove(path)
    if damaged:
        raise UsageError(f'{", ".join(damaged)} of {repo_id} arrived damaged and was removed from the cache: try again')


@contextmanager
def _hub_errors(repo_id: str, revision: Optional[str]) -> Iterator[None]:
    """Says in one line what went wrong between huggingface_hub and the server."""
    server = constants.ENDPOINT
    cache = f'what was downloaded before is in {constants.HF_HUB_CACHE} (HF_HUB_CACHE), and HF_HUB_OFFLINE=1 uses it'
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except HFValidationError as error:
        raise UsageError(str(error).splitlines()[0]) from error
    except RevisionNotFoundError as error:
        raise UsageError(f'{repo_id} has no revision {revision}: check --revision') from error
    except RepositoryNotFoundError as error:
        raise UsageError(f'{repo_id} was not found at {server}, or the token may not see it: check the name, and '
                         'HF_TOKEN or `hf auth login`') from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UsageError(f'{server} refused the token for {repo_id} ({status}): set HF_TOKEN, or run '
                             '`hf auth login`, with a token that has the permission') from error
        raise UsageError(f'{server} answered {status} for {repo_id}: '
                         f'{error.server_message or "no reason given"}; try again later') from error
    except OfflineModeIsEnabled as error:
        raise UsageError('HF_HUB_OFFLINE is set, and this needs the Hub: unset it') from error
    except LocalEntryNotFoundError as error:
        why = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else f'{server} cannot be reached'
        raise UsageError(f'{why}, and {repo_id} is not in the cache, {constants.HF_HUB_CACHE} (HF_HUB_CACHE): check '
                         'the network, HF_ENDPOINT and HF_HUB_OFFLINE') from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
        raise UsageError(f'the transfer with {server} broke off: {reason}; run the same command again, or check the '
                         f'network and HF_ENDPOINT ({cache})') from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog='timm_gpd.hub', description='Publish, fetch and convert students.', epilog=_EPILOG)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    command = commands.add_parser('push', help='publish a student', epilog=_EPILOG, description=(
        'Publish a student in one commit: model.safetensors, config.json, README.md and gap.png. '
        'After an interruption the repo is as it was; run the same command again.'))
    command.add_argument('source', metavar='OUTPUT_OR_CHECKPOINT',
                         help='folder of a run of train.py, one of its checkpoints, or a student\'s folder')
    command.add_argument('--repo-id', required=True, metavar='NAMESPACE/NAME', help='repo; made if it is not there')
    command.add_argument('--private', action='store_true', help='make the repo private')
    command.add_argument('--revision', metavar='BRANCH', help='branch to commit to; made if it is not there')
    command.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing to main')
    command.add_argument('--dry-run', action='store_true', help='contact nothing; say what would be uploaded')
    command = commands.add_parser('pull', help='fetch a student', epilog=_EPILOG,
                                  description='Fetch a student\'s folder, for local-dir:OUTDIR.')
    command.add_argument('repo_id', metavar='REPO_ID', help='namespace/name')
    command.add_argument('outdir', metavar='OUTDIR', help='folder to write; empty or not there')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit (default: main)')
    command = commands.add_parser('convert', help='convert a checkpoint of the authors', epilog=_EPILOG,
                                  description='Turn a checkpoint of the paper\'s authors into a student\'s folder.')
    command.add_argument('file', metavar='FILE.pth.tar', help='checkpoint of guoyongcs/GPD')
    command.add_argument('outdir', metavar='OUTDIR', help='folder to write; empty or not there')
    return parser


def _run_command(argv: Optional[List[str]]) -> None:
    args = _parser().parse_args(argv)
    if args.command == 'push':
        print(push(args.source, args.repo_id, args.private, args.revision, args.create_pr, args.dry_run))
    elif args.command == 'pull':
        pull(args.repo_id, args.outdir, args.revision)
        print(args.outdir)
    else:
        convert(args.file, args.outdir)
        print(args.outdir)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs a command. Returns the exit code."""
    return run_program('timm_gpd.hub', lambda: _run_command(argv))
