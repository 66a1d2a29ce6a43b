"""The command line of ``python -m timm_gpd.hub``."""

import argparse
from typing import List, Optional

from ..command_line import Parser, run_program
from .convert import convert
from .pull import pull
from .push import push

__all__ = ['main']

EPILOG = (
    'exit codes: 0 done, 2 bad input, a refused token, or a Hub that cannot be reached (one line says what to do), '
    '1 anything else. HF_TOKEN or `hf auth login` gives the token, HF_ENDPOINT the server, HF_HUB_CACHE the folder of '
    'what was downloaded; HF_HUB_OFFLINE=1 uses only what is there.'
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog='timm_gpd.hub', description='Publish, fetch and convert students.', epilog=EPILOG)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    command = commands.add_parser(
        'push',
        help='publish a student',
        epilog=EPILOG,
        description=(
            'Publish a student in one commit: model.safetensors, config.json, README.md and gap.png. '
            'After an interruption the repo is as it was; run the same command again.'
        ),
    )
    command.add_argument(
        'source',
        metavar='OUTPUT_OR_CHECKPOINT',
        help="folder of a run of train.py, one of its checkpoints, or a student's folder",
    )
    command.add_argument('--repo-id', required=True, metavar='NAMESPACE/NAME', help='repo; made if it is not there')
    command.add_argument('--private', action='store_true', help='make the repo private')
    command.add_argument('--revision', metavar='BRANCH', help='branch to commit to; made if it is not there')
    command.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing to main')
    command.add_argument('--dry-run', action='store_true', help='contact nothing; say what would be uploaded')
    command = commands.add_parser(
        'pull', help='fetch a student', epilog=EPILOG, description="Fetch a student's folder, for local-dir:OUTDIR."
    )
    command.add_argument('repo_id', metavar='REPO_ID', help='namespace/name')
    command.add_argument('outdir', metavar='OUTDIR', help='folder to write; empty or not there')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit (default: main)')
    command = commands.add_parser(
        'convert',
        help='convert a checkpoint of the authors',
        epilog=EPILOG,
        description="Turn a checkpoint of the paper's authors into a student's folder.",
    )
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
    """Runs a command.

    Args:
        argv: its command line, without the program's name; default that of this process.

    Returns:
        The exit code: 0 done, 2 for what the user has to change.
    """
    return run_program('timm_gpd.hub', lambda: _run_command(argv))
