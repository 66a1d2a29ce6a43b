"""Kills runs at random moments, lets them go on, and compares them with one that was left alone.

    python benchmarks/kill.py --kills 20 --output docs/resume.md

Every run is `train.py` on the digits with all that draws random numbers; each process is killed with SIGKILL, with its
workers, after a random time, and the same command is started again with `--resume auto`. At the end every tensor and
number of every checkpoint, `summary.csv` and the list of files must be, bit for bit, those of the run that was left
alone. Among two processes, torchrun and both are killed. It took about 15 minutes for 20 kills on two cores.

Exit codes: 0 if all runs ended alike, 1 if one did not.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
from programs import differences  # noqa: E402  which tests compare runs with

RUN = [
    *('--epochs', '6', '--digits-train-size', '320', '-b', '16', '--warmup-epochs', '1', '--recovery-interval', '3'),
    *('--mixup', '0.5', '--smoothing', '0.1', '--reprob', '0.3', '--hflip', '0.5', '--drop-path', '0.1'),
    *('--workers', '2', '--model-ema', '--checkpoint-hist', '2', '--resume', 'auto'),
]
KINDS = {
    'augmentation, mixup, EMA, workers': [],
    'the same with 6 branches and AMP bfloat16': ['--gpd-branches', '6', '--amp', '--amp-dtype', 'bfloat16'],
    'plain training, AdamW, two batches an update': ['--opt', 'adamw', '--lr', '1e-3', '--grad-accum-steps', '2'],
    'two processes': ['--sync-bn'],
}


def command(kind: str, folder: Path, experiment: str) -> List[str]:
    processes = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'] if 'processes' in kind else []
    config = ROOT / 'configs' / ('digits.yaml' if 'plain' in kind else 'digits_gpd.yaml')
    data = ['--data-dir', folder / 'data', '--output', folder, '--experiment', experiment]
    return [
        str(part) for part in (sys.executable, *processes, ROOT / 'train.py', '-c', config, *data, *RUN, *KINDS[kind])
    ]


def start(arguments: List[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    with log.open('a') as file:
        return subprocess.Popen(arguments, env=environment, stdout=file, stderr=file, start_new_session=True)


def kill_and_resume(kind: str, folder: Path, kills: int, generator: random.Random, seconds: float) -> Dict[str, Any]:
    """One run, killed a number of times before it ends.

    Returns:
        After how many seconds it was killed, and what differs from the run that was left alone.
    """
    shutil.rmtree(folder / 'run', ignore_errors=True)
    arguments, log = command(kind, folder, 'run'), folder / 'run.log'
    moments: List[float] = []
    while len(moments) < kills:
        process = start(arguments, log)
        moment = generator.uniform(0.4 * seconds, 0.95 * seconds)
        try:
            process.wait(moment)
            break  # it was done before
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            subprocess.run(
                ['pkill', '-KILL', '-f', f'{folder}.*--experiment run']
            )  # torchrun's are groups of their own
            process.wait()
            moments.append(moment)
    if start(arguments, log).wait():
        raise SystemExit(f'a run failed: {log}')
    return {'kind': kind, 'moments': moments, 'differences': differences(folder / 'run', folder / 'alone')}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='at least so many (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: %(default)s)')
    parser.add_argument('--output', type=Path, help='report to write')
    options = parser.parse_args()
    generator = random.Random(options.seed)
    results: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in KINDS:
            folder = Path(temporary) / str(len(results))
            folder.mkdir()
            begin = time.time()
            if start(command(kind, folder, 'alone'), folder / 'alone.log').wait():
                raise SystemExit((folder / 'alone.log').read_text()[-2000:])
            seconds, done = time.time() - begin, 0
            while done < options.kills / len(KINDS):
                results.append(kill_and_resume(kind, folder, 3, generator, seconds))
                done += len(results[-1]['moments'])
                print(results[-1], flush=True)
    failed = [result for result in results if result['differences']]
    if options.output:
        options.output.write_text(report(results, options))
    return 1 if failed else 0


def report(results: List[Dict[str, Any]], options: argparse.Namespace) -> str:
    kills = sum(len(result['moments']) for result in results)
    same = sum(not result['differences'] for result in results)
    rows = [
        f'| {result["kind"]} | {", ".join(f"{moment:.1f}" for moment in result["moments"])} | '
        f'{", ".join(result["differences"][:3]) or "none"} |'
        for result in results
    ]
    return '\n'.join(
        [
            '# Runs that are killed',
            '',
            f'What `python benchmarks/kill.py --kills {options.kills} --seed {options.seed}` found with timm '
            f'{timm.__version__} and torch {torch.__version__}: {kills} kills in {len(results)} runs, of which {same} '
            'ended bit for bit as the run that was left alone: every tensor and number of every checkpoint (student, '
            'dynamic teacher, averages, optimizer, best metric), `summary.csv` and the list of files.',
            '',
            'The runs are of 6 epochs of 20 updates on the digits, with a checkpoint every third update. A process is '
            'killed with SIGKILL, with its workers, a random time after its start, and started again with '
            '`--resume auto`.',
            '',
            '| run | killed after (s) | differences |',
            '|---|---|---|',
            *rows,
            '',
        ]
    )


if __name__ == '__main__':
    sys.exit(main())
