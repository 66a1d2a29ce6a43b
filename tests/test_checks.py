"""Every flag's value is checked before anything is created: the table is held against the parsers themselves."""

import argparse
import logging
import math

import pytest
import timm
import torch

from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args, parse_validate_args, train_parser, validate_parser
from timm_gpd.training.args.adversarial import fraction
from timm_gpd.training.args.checks import FLAGS, check_flags
from timm_gpd.training.args.combinations import check_batch_norm
from timm_gpd.training.args.refused import Refused
from timm_gpd.training.args.value_kinds import Input, Names, Numbers, Output, Text
from timm_gpd.training.optimizer import check_optimizer

PARSERS = {'train': train_parser(), 'validate': validate_parser()}
PARSE = {'train': parse_train_args, 'validate': parse_validate_args}


def takes_a_value(action):
    return action.nargs != 0 and action.choices is None and not isinstance(action, Refused)


ACTIONS = {
    f'{program} {action.dest}': (program, action)
    for program, parser in PARSERS.items()
    for action in parser._actions
    if takes_a_value(action)
}


def of_kind(kind):
    return [name for name, (_, action) in ACTIONS.items() if isinstance(FLAGS.get(action.dest), kind)]


def flag_of(action):
    return next(option for option in action.option_strings if option.startswith('--'))


def refusal(program, *arguments):
    with pytest.raises(UsageError) as error:
        PARSE[program](['--data-dir', 'x', *map(str, arguments)])
    assert '\n' not in str(error.value)
    return str(error.value)


def test_every_flag_is_in_the_table_and_nothing_else():
    assert {action.dest for _, action in ACTIONS.values()} == set(FLAGS)
    for program, action in ACTIONS.values():
        number = action.type in (int, float, fraction)
        assert isinstance(FLAGS[action.dest], Numbers) == number, f'{program} {action.dest}'


def test_every_default_is_right():
    for parser in PARSERS.values():
        check_flags({**vars(parser.parse_args([])), 'config': None}, parser)


@pytest.mark.parametrize('name', of_kind(Numbers))
def test_numbers_out_of_range_are_refused(name):
    program, action = ACTIONS[name]
    kind, flag = FLAGS[action.dest], flag_of(action)
    bad = [] if action.type is int else ['nan', 'inf']
    step = 1 if action.type is int else 0.001
    good = kind.low if kind.low > -math.inf else -1
    if kind.above:
        good += step
    if math.isfinite(kind.low):
        bad.append(action.type(kind.low - step))
        bad += [action.type(kind.low)] if kind.above else []
    if math.isfinite(kind.high):
        bad.append(action.type(kind.high + step))
        bad += [action.type(kind.high)] if kind.below else []
    count = kind.counts[0] if kind.counts else 1
    for value in bad:
        message = refusal(program, flag, *[value] * count)
        assert message.startswith(f'{flag} must be ') and str(value) in message
    if kind.counts and action.nargs == '+':
        assert message_of_count(kind) in refusal(program, flag, *[action.type(good)] * (kind.counts[-1] + 1))
    assert kind([good] * count if action.nargs else good) is None


def message_of_count(kind):
    return f'takes {" or ".join(map(str, kind.counts))} numbers'


@pytest.mark.parametrize('name', of_kind(Names))
def test_unknown_names_are_refused_with_what_exists(name):
    program, action = ACTIONS[name]
    if (program, action.dest) == ('validate', 'model'):
        pytest.skip('it may be a pattern, or a file of names')
    kind = FLAGS[action.dest]
    message = refusal(program, flag_of(action), 'resnet19x')
    assert message.startswith(f'{flag_of(action)} resnet19x is unknown: ')
    assert sum(known in message for known in kind.known()) >= min(3, len(kind.known()))
    for known in list(kind.known())[:20]:
        assert kind(known) is None


@pytest.mark.parametrize('name', of_kind((Input, Output)))
def test_files_have_to_be_there(name, tmp_path):
    program, action = ACTIONS[name]
    flag = flag_of(action)
    message = refusal(program, flag, tmp_path / 'no' / 'file')
    assert message.startswith(f'{flag} {tmp_path}/no/file ')
    assert refusal(program, flag, tmp_path)  # a folder
    (tmp_path / 'file').write_text('')
    assert FLAGS[action.dest](str(tmp_path / 'file')) is None


def test_text_says_who_checks_it():
    assert all(kind.checked for kind in FLAGS.values() if isinstance(kind, Text))


def test_choices_of_the_parser_are_listed():
    for program, parser in PARSERS.items():
        for action in parser._actions:
            if action.choices is not None:
                message = refusal(program, flag_of(action), 'nonsense')
                assert all(str(choice) in message for choice in action.choices)


@pytest.mark.parametrize(
    'policy, problem',
    [
        ('rand-m9-mstd0.5-inc1', ''),
        ('rand', ''),
        ('rand-mstd1-tweights', ''),
        ('augmix-m5-w4-d2', ''),
        ('original-mstd0.5', ''),
        ('v0r', ''),
        ('3a', ''),
        ('random-m9', 'is unknown: policies are rand-..., augmix-...'),
        ('v1', 'is unknown: policies are rand-..., augmix-...'),
        ('rand-q9', 'is no policy that timm reads: Unknown RandAugment config section'),
        ('original-w3', 'is no policy that timm reads: Unknown AutoAugment config section'),
        ('rand-mfoo', "has the part 'mfoo': a part is letters and a number"),
        ('rand-m9-mstd-5', "has the part 'mstd': a part is letters and a number"),
        ('rand-m9-n0', "has the part 'n0': n is at least 1"),
        ('rand-m9-p2', "has the part 'p2': p is a probability"),
    ],
)
def test_policies(policy, problem):
    if problem:
        assert f'--aa {policy} {problem}' in refusal('train', '--aa', policy)
    else:
        assert PARSE['train'](['--data-dir', 'x', '--aa', policy]).aa == policy


@pytest.mark.parametrize('name', ['sgd', 'lookahead_adamw', 'AdamW', 'muon'])
def test_optimizers_by_the_names_that_timm_reads(name):
    assert PARSE['train'](['--data-dir', 'x', '--opt', name]).opt == name


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--mixup 0.2 --batch-size 7', 'a batch of 7 is odd'),
        ('--cutmix-minmax 0.2 0.8 --train-img-sizes 32 64 --train-batch-sizes 8 3', 'a batch of 3 is odd'),
        ('--scale 1 0.1', '--scale and --ratio go from low to high'),
        ('--start-epoch 20 --epochs 20', '--start-epoch 20 leaves nothing of the 20 epochs'),
        ('--sched plateau --sched-on-updates', '--sched plateau looks at a metric'),
        ('--min-lr 1 --lr 0.1', '--min-lr 1 is above --lr 0.1'),
        ('--sched wsd --epochs 5', '--sched wsd has 0 epochs after the warmup'),
        ('--sched wsd --epochs 20 --decay-epochs 16', 'has 15 epochs after the warmup, and --decay-epochs is 16'),
        ('--in-chans 1 --input-size 3 32 32', '--in-chans 1 is not the 3 channels of --input-size'),
        ('--img-size 64 --input-size 3 32 32', '--img-size 64 is not the 32 x 32 pixels'),
        ('--in-chans 1 --mean 0.5 0.4 0.3', '--mean has 3 values, and images have 1 channels'),
        ('--model-kwargs num_classes=3', '--model-kwargs has num_classes, which is --num-classes'),
        ('--amp --model-dtype bfloat16', '--amp needs weights in float32'),
        ('--eval-metric top-1', '--eval-metric top-1 is unknown: this run has loss, top1, top5'),
        ('--eval-metric gap', 'is unknown: this run has loss, top1, top5'),
        ('--gpd --eval-metric lap', 'this run has loss, top1, top5, teacher_loss, teacher_top1, teacher_top5, gap'),
        ('--gpd --gpd-method netaug --gpd-ratio 1', '--gpd-method netaug trains wider models than the student: raise'),
        ('--gpd --gpd-method netaug --kd-model-name resnet18', '--gpd-method netaug distils nothing'),
        ('--gpd --gpd-method sandwich --gpd-ratio 3 --torchcompile', 'runs ratios between 1 and --gpd-ratio 3 uncomp'),
        ('--gpd --clip-grad 5 --clip-mode own-norm --gpd-branches 2', 'own-norm goes with one branch'),
        ('--gpd --clip-grad 5 --clip-mode own-norm --torchcompile', 'own-norm needs the student'),
        ('--gpd --clip-grad 5 --clip-mode own-norm --amp', 'own-norm does not go with the scaled gradients'),
        ('--task multilabel --eval-metric top1', 'this run has loss, map, micro_f1, macro_f1, sample_f1'),
    ],
)
def test_what_does_not_go_together(flags, message):
    assert message in refusal('train', *flags.split())


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--use-ema', '--use-ema chooses among the models of a checkpoint'),
        ('--use-teacher', '--use-teacher chooses among the models of a checkpoint'),
        ('--real-labels FILE --valid-labels FILE', '--real-labels are of all 1000 classes'),
        ('--task multilabel --metrics-avg macro', '--metrics-avg is for images of one class'),
        ('--amp --model-dtype float16', '--amp needs weights in float32'),
    ],
)
def test_what_does_not_go_together_in_validation(flags, message, tmp_path):
    (tmp_path / 'labels').write_text('')
    assert message in refusal('validate', *flags.replace('FILE', str(tmp_path / 'labels')).split())


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--epochs 3', '--warmup-epochs 5 of --epochs 3: the learning rate never reaches its value'),
        ('--gpd-ratio 4', '--gpd-ratio does nothing without --gpd'),
        ('--gpd-method netaug', '--gpd-method does nothing without --gpd'),
        ('--clip-mode own-norm', '--clip-mode does nothing without --clip-grad'),
        ('--gpd-switch', '--gpd-switch does nothing without --gpd'),
        ('--gpd --gpd-gap-scales distillation', '--gpd-gap-scales does nothing without --gpd-gap-target'),
        ('--gpd --gpd-between 1', '--gpd-between does nothing with --gpd-method joint'),
        ('--gpd --gpd-method netaug --gpd-weight 1', '--gpd-weight does nothing with --gpd-method netaug'),
        ('--gpd --gpd-method sandwich', '--gpd-method sandwich is --gpd-method joint where --gpd-ratio is 2'),
        ('--kd-temperature 2 --amp-dtype bfloat16', '--kd-temperature does nothing without --kd-model-name'),
    ],
)
def test_what_has_no_effect_is_said(flags, message, caplog):
    with caplog.at_level(logging.WARNING):
        PARSE['train'](['--data-dir', 'x', *flags.split()])
    assert message in caplog.text


def test_a_batch_of_one_needs_a_model_without_batch_norm():
    check_batch_norm(2, timm.create_model('test_resnet'))
    check_batch_norm(1, timm.create_model('test_vit'))
    with pytest.raises(UsageError, match=r'a batch of one .* \(conv1.1\): raise --batch-size'):
        check_batch_norm(1, timm.create_model('test_resnet'))


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--opt-kwargs foo=1', "unexpected keyword argument 'foo' (check --opt sgd"),
        ('--opt adam --opt-betas 0.9', '--opt adam has 2 betas: --opt-betas gives 1'),
        ('--opt adamw --opt-betas 0.9 0.9 0.9', '--opt adamw has 2 betas: --opt-betas gives 3'),
        ('--opt adahessian', '--opt adahessian needs second derivatives'),
    ],
)
def test_arguments_that_an_optimizer_does_not_take(flags, message):
    with pytest.raises(UsageError) as error:
        check_optimizer(PARSE['train'](['--data-dir', 'x', *flags.split()]))
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lookahead_radam', 'muon', 'adan'])
def test_arguments_that_an_optimizer_takes(name, caplog):
    check_optimizer(PARSE['train'](['--data-dir', 'x', '--opt', name, '--opt-eps', '1e-6', '--layer-decay', '0.7']))
    check_optimizer(PARSE['train'](['--data-dir', 'x', '--opt', 'sgd', '--opt-betas', '0.9', '0.99']))
    assert '--opt-betas does nothing: --opt sgd has none' in caplog.text


def test_a_flag_without_an_entry_would_be_found():
    parser = argparse.ArgumentParser()
    action = parser.add_argument('--new', type=int)
    assert takes_a_value(action) and action.dest not in FLAGS


def test_backends_are_those_of_torch():
    assert 'inductor' in FLAGS['torchcompile'].known() and set(FLAGS['torchcompile'].known()) <= set(
        torch.compiler.list_backends(exclude_tags=())
    )
