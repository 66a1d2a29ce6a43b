"""What a sweep has found, kept so that an interrupted one goes on where it stopped."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import timm
import torch

__all__ = ['PATH_SOURCES', 'Cache', 'Record', 'fingerprint']

Record = Dict[str, Any]

PACKAGE = Path(__file__).parents[1]
# What the outcome depends on: the data, the rules, and all that creates, plans and compares with them.
SOURCES = (
    'axes.py',
    'plan.py',
    'private_torch.py',
    'rules/**/*.py',
    'expansion/**/*.py',
    'coverage/architectures.py',
    'coverage/sweep.py',
)
# What else the outcome of the whole path depends on.
PATH_SOURCES = (
    *SOURCES,
    'coverage/whole_path.py',
    'teacher/**/*.py',
    'task/**/*.py',
    'losses/**/*.py',
    'distillers/**/*.py',
)


class Cache:
    """Records of one timm, one torch, one ratio and one state of this package, in a file of JSON lines.

    Args:
        path: the file; it is created with the first record. Records of others in it are left alone and not read.
        ratio: the expansion ratio.
    """

    def __init__(self, path: Path, ratio: int) -> None:
        self.path = path
        state = f'timm-{timm.__version__}-torch-{torch.__version__}-r{ratio}'
        self.keys = {
            step: f'{state}-{fingerprint(sources=sources)}'
            for step, sources in (('plan', SOURCES), ('compare', SOURCES), ('path', PATH_SOURCES))
        }
        self.records: Dict[Tuple[str, str], Record] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that an interruption cut off
                if record.pop('key', '') == self.keys.get(record.get('step')):
                    self.records[record['step'], record['model']] = record

    def add(self, record: Record) -> None:
        """Keeps a record, here and in the file; it has at least ``step`` and ``model``."""
        self.records[record['step'], record['model']] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a') as file:
            file.write(json.dumps({'key': self.keys[record['step']], **record}) + '\n')

    def get(self, step: str, name: str) -> Record:
        """The record of a step (``'plan'``, ``'compare'``, ``'path'``) for an architecture; empty if there is none."""
        return self.records.get((step, name), {})

    def knows(self, step: str, name: str, reduction: Record) -> bool:
        """Whether there is a record of the architecture, whole or reduced like this."""
        record = self.get(step, name)
        return bool(record) and record.get('reduction', {}) in ({}, reduction)


def fingerprint(package: Path = PACKAGE, sources: Sequence[str] = SOURCES) -> str:
    """What stands for the state of this package's code, as far as the outcome depends on it.

    Args:
        package: the folder of the package.
        sources: patterns of the files in it.

    Returns:
        A digest of names and contents of the files; another if one of them changes, moves, comes or goes.
    """
    digest = hashlib.sha1()
    for path in sorted({path for pattern in sources for path in package.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f'{path.relative_to(package).as_posix()}\0{len(content)}\0'.encode() + content)
    return digest.hexdigest()[:12]
