"""Runs of ``train.py`` whose outcome is kept: a line of JSON each, and none that is there is run again."""

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
from tqdm import tqdm

from machine import processor_name
from ways import WAYS, needs_static_teacher

__all__ = ['ROOT', 'Record', 'Results', 'Trial']

ROOT = Path(__file__).resolve().parents[1]

Record = Dict[str, Any]


class Trial(NamedTuple):
    """One run.

    Attributes:
        way: a key of ``ways.WAYS``.
        lr: learning rate.
        epochs: of the schedule.
        seed: of the run.
        split: on which the student is measured.
    """

    way: str
    lr: float
    epochs: int
    seed: int
    split: str


class Results:
    """The lines of a study, and the runs that add to them.

    Args:
        path: file of JSON lines.
        config: configuration of plain training, a file.
        data_dir: folder of the data.
        jobs: runs at a time, one core each.
        device: where they compute.
        static_teacher: folder of the student of another run, which ways with a static teacher learn from.
        extra: more arguments of every ``train.py``. A file of lines holds runs of the same ones.
    """

    def __init__(
        self,
        path: Path,
        config: Path,
        data_dir: str,
        jobs: int,
        device: str = 'cpu',
        static_teacher: Optional[str] = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.path, self.config, self.data_dir, self.jobs, self.device = path, config, data_dir, jobs, device
        self.static_teacher, self.extra = static_teacher, tuple(extra)
        self.lock = threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: Dict[Trial, Record] = {}
        for record in map(json.loads, lines):
            self.records[Trial(**{name: record[name] for name in Trial._fields})] = record

    def measure(self, trials: Sequence[Trial]) -> Dict[Trial, Record]:
        """Runs what has no line yet. Returns the records of all."""
        missing = sorted(
            (trial for trial in dict.fromkeys(trials) if trial not in self.records), key=lambda trial: -trial.epochs
        )
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in tqdm(pool.map(self._run, missing), total=len(missing), unit='run', disable=None):
                pass
        return {trial: self.records[trial] for trial in trials}

    def _run(self, trial: Trial) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = self.command(trial)
            seconds = _call([*command, '--output', folder, '--experiment', 'run'])
            with open(Path(folder, 'run', 'summary.csv'), newline='') as file:
                row = list(csv.DictReader(file))[-1]
        record = {
            **trial._asdict(),
            'top1': float(row['eval_top1']),
            'teacher_top1': float(row['eval_teacher_top1']) if row.get('eval_teacher_top1') else None,
            'static_top1': float(row['eval_static_top1']) if row.get('eval_static_top1') else None,
            'device': self.device,
            'processor_seconds': round(seconds, 1),
            'command': ' '.join(part.removeprefix(f'{ROOT}{os.sep}') for part in command[1:]),
            'commit': subprocess.run(
                ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
            'processor': torch.cuda.get_device_name() if self.device == 'cuda' else processor_name(),
            'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()},
        }
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, 'a') as file:
                file.write(json.dumps(record) + '\n')
            self.records[trial] = record

    def command(self, trial: Trial) -> List[str]:
        """The command of a run, without where it writes to."""
        teacher: List[str] = []
        if needs_static_teacher(trial.way):
            if self.static_teacher is None:
                sys.exit(f'{trial.way} needs a static teacher: train one, and name its student with --static-teacher')
            teacher = ['--kd-model-name', f'local-dir:{self.static_teacher}']
        return [
            sys.executable,
            *(str(ROOT / 'train.py'), '--config', str(self.config), '--data-dir', self.data_dir),
            *('--lr', str(trial.lr), '--epochs', str(trial.epochs), '--seed', str(trial.seed)),
            *('--val-split', trial.split, '--val-interval', str(trial.epochs), '--device', self.device),
            *WAYS[trial.way].split(),
            *teacher,
            *self.extra,
        ]


def _call(command: Sequence[str]) -> float:
    """Runs a command on one core. Returns its processor time in seconds."""
    with tempfile.TemporaryFile('w+') as log:
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f'{" ".join(command)} failed with exit code {process.returncode}: {log.read()[-500:]}')
    return usage.ru_utime + usage.ru_stime
