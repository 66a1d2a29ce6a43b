"""Small random networks, by seed: each has to have an exact dynamic teacher, or to be refused.

A network is data before it is a module: :func:`describe` gives its blocks, and :func:`build` builds it.

    python tests/random_networks.py --seeds 0 20000 --output docs/random_networks.md    # judges them all
    python tests/random_networks.py --seed 123          # judges one, and prints it
    python tests/random_networks.py --seed 123 --without 2 0    # the same without its third and first block
"""

import argparse
import os
import platform
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import random_attention  # noqa: F401  registers its blocks
from random_blocks import BLOCKS, WIDTHS, parameter, shape_of
from timm_gpd import DynamicTeacher, UnsupportedModelError, plan_expansion
from timm_gpd.errors import first_line
from timm_gpd.expansion.verify import (
    compare,
    disable_randomness_,
    randomize_,
    read_back_error,
    relative_error,
)
from timm_gpd.teacher.rehearsal import rehearse

Block = Tuple[str, int]  # its kind, and a seed for what else is random in it
Description = Dict[str, Any]
IMAGE = 8  # pixels
FAILURES = ('inexact', 'exception')  # what may not happen


class Residual(nn.Module):
    """x + scale * f(x), the scale by channel or by one number."""

    def __init__(self, inner: nn.Module, scale: Any) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return x + (y if self.scale is None else y * self.scale)


class MatrixStem(nn.Module):
    """Patches times a matrix, to (B, width, 4, 4)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(4 * channels, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.unfold(x, 2, stride=2).mT @ self.weight).mT.unflatten(2, (4, 4))


STEMS = {'conv': lambda channels, width: nn.Conv2d(channels, width, 2, stride=2), 'matrix': MatrixStem}


class RandomNetwork(nn.Module):
    """Images (B, channels, 8, 8) to logits (B, 5)."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.in_chans, width = description['channels'], description['width']
        self.pretrained_cfg = {'input_size': (self.in_chans, IMAGE, IMAGE)}
        self.stem = STEMS[description['stem']](self.in_chans, width)
        self.maps = self._stack('map', width, description['maps'])
        self.tokens = self._stack('tokens', width, description['tokens'])
        self.reduce = description['reduce']
        self.head = nn.Linear(width if self.reduce == 'mean' else 16 * width, 5)

    @staticmethod
    def _stack(rank: str, width: int, blocks: List[Block]) -> nn.Sequential:
        modules: List[nn.Module] = []
        for kind, seed in blocks:
            rng = random.Random(seed)
            module = BLOCKS[kind][1](width, rng)
            choice = rng.random()
            if choice < 0.2:
                module = Residual(module, None)
            elif choice < 0.4:
                module = Residual(module, parameter(*shape_of(rank, width)))
            elif choice < 0.5:
                module = nn.Sequential(nn.Sequential(module), nn.Identity())
            if rng.random() < 0.1:
                for tensor in module.parameters():
                    tensor.requires_grad_(False)
            modules.append(module)
        return nn.Sequential(*modules)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maps(self.stem(x))
        if self.reduce == 'flatten maps':
            return self.head(F.avg_pool2d(x, 1).relu().flatten(1))
        x = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head(x.mean(1) if self.reduce == 'mean' else x.flatten(1))


def describe(seed: int) -> Description:
    """A network as data: sizes, ratio, first and last layers, and its blocks, each with a seed of its own."""
    rng = random.Random(seed)
    kinds = {
        rank: sorted(kind for kind, (own, _) in BLOCKS.items() if own in (rank, 'any')) for rank in ('map', 'tokens')
    }

    def blocks(rank: str) -> List[Block]:
        return [(rng.choice(kinds[rank]), rng.randrange(10**6)) for _ in range(rng.randint(0, 3))]

    reduce = rng.choice(7 * ['mean'] + 2 * ['flatten tokens'] + ['flatten maps'])
    return {
        'seed': seed,
        'ratio': rng.choice((2, 2, 3)),
        'width': rng.choice(WIDTHS),
        'channels': rng.choice((1, 3)),
        'stem': rng.choice(5 * ['conv'] + ['matrix']),
        'reduce': reduce,
        'maps': blocks('map'),
        'tokens': [] if reduce == 'flatten maps' else blocks('tokens'),
    }


def build(description: Description) -> RandomNetwork:
    """The network of a description, with values of the description's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(description['seed'])
        return RandomNetwork(description)


class Verdict(NamedTuple):
    """What became of a network.

    Attributes:
        outcome: ``'exact'``, ``'refused by the planner'``, ``'refused by the numeric check'``, or one of ``FAILURES``.
        reason: the error, on one line; '' where there is none.
    """

    outcome: str
    reason: str = ''


def judge(description: Description) -> Verdict:
    """Does what :func:`timm_gpd.expand` does, and checks what it gives in all ways that a user sees."""
    torch.manual_seed(0)
    try:
        student = build(description)
        try:
            plan = plan_expansion(student, description['ratio'])
        except UnsupportedModelError as error:
            return Verdict('refused by the planner', first_line(error))
        try:
            evaluation = compare(student, plan, ('evaluation',))['evaluation']
        except UnsupportedModelError as error:
            return Verdict('refused by the numeric check', first_line(error))
        if not evaluation.is_exact:
            return Verdict('refused by the numeric check', 'the planned teacher differs from the student')
        rehearse(DynamicTeacher(student, plan), student)
        return _judge_teacher(student, plan)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict('exception', f'{type(error).__name__}: {first_line(error)} ({where.name}:{where.lineno})')


def _judge_teacher(student: nn.Module, plan: Any) -> Verdict:
    training = compare(student, plan, ('training',))['training']
    if not training.is_exact:
        return Verdict('inexact', f'in training mode, by {training.error:.1e}')
    student = disable_randomness_(randomize_(student.double())).eval()
    if read_back_error(student, plan) > 1e-15:
        return Verdict('inexact', 'extraction does not return the student')
    teacher = DynamicTeacher(student, plan).eval()
    x = torch.randn(2, *plan.input_shape, dtype=torch.float64)
    with torch.no_grad():
        expected = student(x)
        student_logits, teacher_logits = teacher.joint(x)
        extracted = teacher.extract_student()(x)
    # The plan's own comparison has judged the teacher by the student's rounding; here gross errors would show.
    errors = {
        'teacher': relative_error(teacher_logits, expected),
        'student': relative_error(student_logits, expected),
        'extracted': relative_error(extracted, expected),
    }
    wrong = [f'{name} by {error:.1e}' for name, error in errors.items() if error > 1e-9]
    return Verdict('inexact', ', '.join(wrong)) if wrong else Verdict('exact')


def culprit(description: Description, verdict: Verdict) -> str:
    """The kind of block that has the same outcome when it is alone; 'a combination' if there is none."""
    empty = {**description, 'maps': [], 'tokens': []}
    if judge(empty).outcome == verdict.outcome:
        return f'{description["stem"]} stem, {description["reduce"]}'
    for stack in ('maps', 'tokens'):
        for block in description[stack]:
            alone = {**empty, 'reduce': 'mean', stack: [block]}
            if judge(alone).outcome == verdict.outcome:
                return block[0]
    return 'a combination'


def show(description: Description) -> str:
    """A network, block by block, and as the module that it is."""
    numbered = enumerate([*description['maps'], *description['tokens']])
    rest = {key: value for key, value in description.items() if key not in ('maps', 'tokens')}
    blocks = [f'  block {number}: {block}' for number, block in numbered]
    return '\n'.join([str(rest), *blocks, str(build(description))])


def without(description: Description, numbers: List[int]) -> Description:
    """A description without some of its blocks, counted as :func:`show` does."""
    count = len(description['maps'])
    return {
        **description,
        'maps': [block for number, block in enumerate(description['maps']) if number not in numbers],
        'tokens': [block for number, block in enumerate(description['tokens']) if number + count not in numbers],
    }


def judge_all(seeds: range) -> Iterator[Tuple[int, Verdict, str]]:
    """Seed, verdict and, where it is not exact, the block that is to blame."""
    for seed in seeds:
        description = describe(seed)
        verdict = judge(description)
        yield seed, verdict, '' if verdict.outcome == 'exact' else culprit(description, verdict)


def report(results: List[Tuple[int, Verdict, str]], command: str, seconds: float) -> str:
    """The page, in Markdown."""
    outcomes = Counter(verdict.outcome for _, verdict, _ in results)
    seeds, counts, reasons = defaultdict(list), Counter(), {}
    for seed, verdict, kind in results:
        if verdict.outcome != 'exact':
            key = verdict.outcome, kind
            counts[key] += 1
            seeds[key].append(seed)
            reasons.setdefault(key, re.sub(r'.*of class [^ ]*: ', '', verdict.reason).replace('|', '\\|')[:160])
    lines = [
        '# Random networks',
        '',
        f'What `{command}` found with torch {torch.__version__.split("+")[0]} and Python {platform.python_version()}, '
        f'in {seconds / 60:.0f} minutes of one core.',
        '',
        f'{len(results)} networks were drawn by seed from {len(BLOCKS)} kinds of block. Each has to have a dynamic '
        'teacher that is exact (in float64, with randomised weights, in evaluation and training mode, by itself, '
        'jointly with its student, and extracted), or to be refused with an `UnsupportedModelError`.',
        '',
        '| outcome | networks |',
        '|---|---:|',
        *(
            f'| {outcome} | {outcomes[outcome]} |'
            for outcome in ('exact', 'refused by the planner', 'refused by the numeric check', *FAILURES)
        ),
        '',
        '*Inexact* is a wrong teacher, *exception* any other error: neither may happen.',
        '',
        '## What is refused, by the block that is to blame',
        '',
        '| refused by | block | networks | seeds | for example |',
        '|---|---|---:|---|---|',
        *(
            f'| {outcome.replace("refused by the ", "")} | {kind} | {counts[outcome, kind]} | '
            f'{", ".join(map(str, seeds[outcome, kind][:3]))} | {reasons[outcome, kind]} |'
            for outcome, kind in sorted(counts, key=lambda key: (key[0], -counts[key]))
        ),
    ]
    return '\n'.join(lines) + '\n'


def main() -> int:
    """Returns the exit code: 1 if a network failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs=2, metavar=('FIRST', 'END'), default=(0, 300))
    parser.add_argument('--seed', type=int, help='judge and print one network')
    parser.add_argument('--without', type=int, nargs='+', default=[], metavar='BLOCK', help='blocks to leave out')
    parser.add_argument('--output', type=Path, help='page to write')
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    if options.seed is not None:
        description = without(describe(options.seed), options.without)
        print(show(description))
        verdict = judge(description)
        print(f'{verdict.outcome}: {verdict.reason}')
        return verdict.outcome in FAILURES
    start, results = time.process_time(), []
    for result in judge_all(range(*options.seeds)):
        results.append(result)
        if result[1].outcome in FAILURES:
            print(result, flush=True)
        if options.output and (len(results) % 100 == 0 or result[0] + 1 == options.seeds[1]):
            command = f'python tests/random_networks.py --seeds {options.seeds[0]} {result[0] + 1}'
            options.output.write_text(report(results, command, time.process_time() - start))
    print(Counter(verdict.outcome for _, verdict, _ in results))
    return any(verdict.outcome in FAILURES for _, verdict, _ in results)


if __name__ == '__main__':
    sys.exit(main())
