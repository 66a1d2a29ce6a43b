"""The benchmark of ways to train: which runs it makes, and what it makes of them."""

import json
import sys

import pytest

from programs import ROOT

sys.path.insert(0, f'{ROOT}/benchmarks')
import distillation
from distillation import LEARNING_RATES, LENGTHS
from distillation_report import plot, report, searched
from found import best_ways
from runs import Results, Trial
from ways import STATIC, WAYS


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results whose runs are a formula: the best rate is 0.2, netaug gains 2 points at 1.5 times the cost."""
    ran = []

    def run(self, trial):
        ran.append(trial)
        gain = {'plain': 0.0, 'netaug': 2.0}.get(trial.way, -1.0)
        top1 = 50 + gain - 10 * abs(trial.lr - 0.2) + trial.epochs**0.5 + 0.1 * (trial.seed % 7)
        cost = 7 + trial.epochs * (1.0 if trial.way == 'plain' else 1.5)  # 7 to start
        record = {**trial._asdict(), 'top1': top1, 'teacher_top1': None, 'processor_seconds': cost}
        with open(self.path, 'a') as file:
            file.write(json.dumps(record) + '\n')
        self.records[trial] = record

    monkeypatch.setattr(Results, '_run', run)

    def create():
        ran.clear()
        return Results(tmp_path / 'lines.jsonl', tmp_path / 'c.yaml', 'data', 1), ran

    return create


def test_a_search_keeps_the_best_and_plain_training_and_goes_on_where_it_stopped(results):
    first, ran = results()
    ranked = distillation.search(first, ['plain', 'gpd', 'netaug'], LEARNING_RATES, rungs=(1, 4), keep=0.25)
    assert ranked[0] == 'netaug'
    assert len(ran) == 15 + 5 + 2 and {trial.split for trial in ran} == {'validation'}
    assert {(trial.way, trial.lr) for trial in ran if trial.epochs == 4 and trial.way != 'plain'} == {
        ('netaug', 0.2),
        ('netaug', 0.1),
    }
    again, ran = results()
    assert (
        distillation.search(again, ['plain', 'gpd', 'netaug'], LEARNING_RATES, rungs=(1, 4), keep=0.25) == ranked
        and not ran
    )


def test_a_way_whose_window_would_be_empty_waits(results):
    found, ran = results()
    distillation.search(found, ['plain', 'netaug', 'last quarter'], LEARNING_RATES, rungs=(2, 4), keep=0.25)
    assert {trial.epochs for trial in ran if trial.way == 'last quarter'} == {4}
    assert {trial.lr for trial in ran if trial.way == 'last quarter'} == set(LEARNING_RATES)


def test_what_is_confirmed_is_compared_at_equal_epochs_and_at_equal_cost(results):
    found, ran = results()
    distillation.search(found, ['plain', 'gpd', 'netaug'], LEARNING_RATES, rungs=(1, 4), keep=0.25)
    ran.clear()
    distillation.search_lengths(found, epochs=4, lengths=LENGTHS)
    assert {trial.split for trial in ran} == {'validation'} and {trial.way for trial in ran} == {'plain'}
    assert {(t.lr, t.epochs) for t in ran} == {(lr, epochs) for lr in (0.1, 0.2) for epochs in (8, 16, 32)}
    ran.clear()
    assert best_ways(found, epochs=4, count=2) == ['netaug']
    distillation.confirm(found, ['netaug'], seeds=3, epochs=4, lengths=LENGTHS)
    assert {trial.split for trial in ran} == {'test'} and {trial.seed for trial in ran} == {100, 101, 102}
    assert {(t.way, t.lr, t.epochs) for t in ran} == {('netaug', 0.2, 4), ('netaug', 0.2, 8)} | {
        ('plain', 0.2, epochs) for epochs in (4, 8, 16, 32)
    }
    rows = [[cell.strip() for cell in line.split('|')] for line in report(found).splitlines()]
    (cells,) = [row for row in rows if row[1:4] == ['netaug', '0.2', '4']]
    assert cells[4] == '3' and cells[7] == '1.50'
    assert cells[8] == '2.00 ± 0.00, better in 3 of 3'  # plain training of 4 epochs
    longer = 8**0.5 - 4**0.5  # the shortest plain training that costs as much or more has 8 epochs
    assert cells[9] == f'{2 - longer:.2f} ± 0.00, better in 3 of 3 (8 epochs)'
    assert '| netaug | 53.00 (0.2) | 54.00 (0.2) |' in searched(found)
    plot(found, found.path.with_suffix('.png'))
    assert found.path.with_suffix('.png').stat().st_size > 10_000
    (cells,) = [row for row in rows if row[1:4] == ['netaug', '0.2', '8']]
    assert cells[8] == '2.00 ± 0.00, better in 3 of 3' and cells[9].endswith('(16 epochs)')


def test_what_was_not_searched_is_not_confirmed(results):
    with pytest.raises(SystemExit, match='nothing is known about netaug for 4 epochs: search first'):
        distillation.confirm(results()[0], ['netaug'], seeds=1, epochs=4, lengths=LENGTHS)


def test_a_best_way_that_is_not_to_run_longer_runs_once(results):
    found, ran = results()
    distillation.search(found, ['plain', 'netaug'], [0.2], rungs=(4,), keep=0.25)
    ran.clear()
    distillation.confirm(found, ['netaug'], seeds=3, epochs=4, lengths=[1], longer=1)
    assert len(ran) == 6 and {trial.epochs for trial in ran} == {4}


def test_nothing_to_report(results):
    with pytest.raises(SystemExit, match='nothing is confirmed yet'):
        report(results()[0])


def test_every_way_is_a_command_that_train_understands(tmp_path):
    from timm_gpd.training.args import parse_train_args

    config = f'{ROOT}/configs/digits.yaml'
    lines = Results(tmp_path / 'lines.jsonl', config, 'data', 1, static_teacher='teacher', extra=['--workers', '3'])
    for way in WAYS:
        args = parse_train_args(lines.command(Trial(way, 0.2, 4, 7, 'validation'))[2:])
        assert (args.lr, args.epochs, args.seed, args.val_split, args.workers) == (0.2, 4, 7, 'validation', 3)
        assert args.gpd == (way not in STATIC and way != 'plain' or '+ gpd' in way)
        assert args.kd_model_name == ('local-dir:teacher' if way in STATIC else None)


def test_weights_of_one_loss_are_one_way_among_the_best(results):
    found, ran = results()
    ways = ['plain', 'gpd', 'static kd; b = 0.1', 'static kd; b = 1', 'static dkd; b = 1']
    distillation.search(found, ways, [0.1, 0.2], rungs=(4,), keep=0.25)
    assert best_ways(found, epochs=4, count=9) == ['gpd', 'static kd; b = 0.1', 'static dkd; b = 1']


def test_seeds_of_a_search_are_averaged(results):
    found, ran = results()
    distillation.search(found, ['plain', 'gpd'], [0.1, 0.2], rungs=(4,), keep=0.25, seeds=3)
    assert len(ran) == 12 and {trial.seed for trial in ran} == {0, 1, 2}
    assert '| plain | 52.10 (0.2) |' in searched(found)  # 50 + 2 + the mean of 0, 0.1 and 0.2
