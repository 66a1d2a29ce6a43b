"""docs/cost.md and docs/cost.json: what step_cost.py and ways_cost.py measured."""

import json
import os
from typing import Any, Dict, Iterator

import timm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = ('resnet18', 'mobilenetv1_100', 'vit_tiny_patch16_224')
MODES = ('fp32', 'amp', 'channels_last', 'compile')
DEVICES = ('cpu', 'cuda')
NOT_MEASURED = 'not measured'
# (batch, pixels): the small batch of the design, and where a step is long enough for a GPU.
SETTINGS = {'cpu': ((16, 128),), 'cuda': ((16, 128), (128, 224))}


def format_ratio(cell: Dict[str, Any], key: str, branches: str) -> str:
    value = cell.get(key, {}).get(branches)
    return NOT_MEASURED if value is None else f'{value:.3f}'


def rows(results: Dict[str, Any], device: str) -> Iterator[str]:
    """A row for every cell of a device that was measured."""
    for batch, size in SETTINGS[device]:
        for name in MODELS:
            for mode in MODES:
                cell = results['cells'].get(f'{device}/{name}/{mode}/{batch}/{size}')
                if cell is None:
                    continue
                floor = f'{cell["seconds"]["floor"]:.3g} s'
                figures = [format_ratio(cell, kind, count) for kind in ('ratio', 'memory_ratio') for count in '16']
                if name.startswith('vit'):
                    figures[1] = figures[3] = 'no such kernel'
                over_eager = ', '.join(f'{ratio:.3f}' for ratio in cell.get('over_eager', {}).values())
                cells = [device, name, mode, f'{batch} at {size} px', floor, *figures, over_eager]
                yield f'| {" | ".join([*cells, cell.get("processor", ""), cell.get("torch", "")])} |'


def way_rows(results: Dict[str, Any]) -> Iterator[str]:
    """The table of ``ways_cost.py``, if it was measured."""
    if not results.get('ways'):
        return
    yield '## Ways of training'
    yield ''
    yield (
        'Measured by `python benchmarks/ways_cost.py`, M = 1, on the CPU in processor time. A floor is a training step '
        'of the plain model of every ratio that must run, and of a paused teacher a forward pass; where half of the '
        'steps are of another kind, one of each.'
    )
    yield ''
    yield '| setting | way | models | floor | step over it | step over plain | processor | torch |'
    yield '|---|---|---|---|---|---|---|---|'
    for row in results['ways'].values():
        yield (
            f'| {row["setting"]} | {row["way"]} | {row["models"]} | {row["floor"]:.3g} s | {row["ratio"]:.3f} | '
            f'{row["over_plain"]:.2f} | {row["processor"]} | {row["torch"]} |'
        )
    yield ''


def static_rows(results: Dict[str, Any]) -> Iterator[str]:
    """The table of steps with a static teacher, if they were measured."""
    if not results.get('static'):
        return
    yield '## With a static teacher'
    yield ''
    yield (
        'A step of student and dynamic teacher, M = 1, that both learn from a static teacher; the floor has one of its '
        'forward passes in addition. "Losses" is what the losses from it cost both learners by themselves, forward and '
        'backward, with the modules that they train, and the last ratio is over the floor and that. On the CPU in '
        'processor time. Measured by `OMP_NUM_THREADS=1 python benchmarks/step_cost.py --static --modes fp32`.'
    )
    yield ''
    yield (
        '| device | student, static teacher | mode | batch | loss | floor | losses | step over floor '
        '| over floor and losses | processor | torch |'
    )
    yield '|---' * 11 + '|'
    for row in results['static'].values():
        figures = [f'{row["seconds"][name]:.3g} s' for name in ('floor', 'losses')]
        figures += [f'{row[ratio]:.3f}' for ratio in ('ratio', 'ratio_with_losses')]
        cells = [row['device'], f'{row["name"]}, {row["static"]}', row['mode'], f'{row["batch"]} at {row["size"]} px']
        yield f'| {" | ".join([*cells, row["losses"], *figures, row["processor"], row["torch"]])} |'
    yield ''


def write_report(results: Dict[str, Any], folder: str) -> None:
    """Writes cost.json and cost.md."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'cost.json'), 'w') as file:
        json.dump(results, file, indent=1, sort_keys=True)
        file.write('\n')
    lines = [
        '# What a training step costs',
        '',
        'Written by `python benchmarks/step_cost.py`; figures are in `cost.json`.',
        '',
        'The *floor* is one step of the plain wide model and one of the plain student on the same batch. Ratios are a '
        'GPD step over the floor, ratio r = 2, with M branches, fused SGD with momentum: medians over turns in one '
        'process. Memory is the peak of a few steps: tensors that are held between steps and what a step adds, each in '
        'processes of its own, the median of three, or of seven where compiled. The last column is a compiled GPD step '
        'over an eager one, in the same turns, for each M. On the CPU, freed memory is kept and denormal numbers are '
        'flushed, as in `train.py`, for every step alike.',
        '',
    ]
    measured = [row for device in DEVICES for row in rows(results, device)]
    lines += [
        f'A row is what was measured last, on the processor and with the torch that it names; timm {timm.__version__}.',
        '',
        '| device | model | mode | batch | floor | time, M = 1 | time, M = 6 | memory, M = 1 | memory, M = 6 '
        '| over eager | processor | torch |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
        *measured,
        '',
        *(
            f'Not measured: {device}. `python benchmarks/step_cost.py --devices {device}` does it.\n'
            for device in DEVICES
            if not list(rows(results, device))
        ),
        *(line for note in results.get('notes', []) for line in (note, '')),  # what people have found out
        *static_rows(results),
        *way_rows(results),
        '## Around the step',
        '',
        'On the CPU, in seconds. `expand` plans, verifies itself in float64, and builds. "Sharing in a step" is what '
        "both models' parameters cost a step: merging branches, rescaling, slicing, and their gradients.",
        '',
    ]
    rest = results.get('rest', {})
    columns = list(dict.fromkeys(key for row in rest.values() for key in row if key != 'processor'))
    if columns:
        lines += [f'| {" | ".join(["model", *columns, "processor"])} |', '|---' * (len(columns) + 2) + '|']
        for name, row in rest.items():
            figures = [f'{row[key]:.3f}' if key in row else NOT_MEASURED for key in columns]
            lines.append(f'| {" | ".join([name, *figures, row["processor"]])} |')
    else:
        lines.append(NOT_MEASURED)
    with open(os.path.join(folder, 'cost.md'), 'w') as file:
        file.write('\n'.join(lines + ['']))


def load_results(folder: str) -> Dict[str, Any]:
    path = os.path.join(folder, 'cost.json')
    if not os.path.isfile(path):
        return {'cells': {}, 'rest': {}}
    with open(path) as file:
        return json.load(file)
