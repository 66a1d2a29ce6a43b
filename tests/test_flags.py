"""Every flag of timm's scripts is ours or refused with a reason; configurations are checked as command lines are."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from programs import ROOT, run
from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args, parse_validate_args, train_parser, validate_parser
from timm_gpd.training.args.refused import Refused
from timm_gpd.training.data.loaders import check_loaders
from timm_gpd.training.task import check_task

FIXTURES = Path(__file__).parent / 'fixtures'
TIMM = json.loads((FIXTURES / 'timm_flags.json').read_text())
PROGRAMS = {
    'train': (train_parser(), vars(parse_train_args([]))),
    'validate': (validate_parser(), vars(parse_validate_args([]))),
}
COMMANDS = [
    line for line in (FIXTURES / 'timm_commands.txt').read_text().splitlines() if line and not line.startswith('#')
]


def actions(program):
    """What the program's parser knows, by every spelling of a flag."""
    parser, _ = PROGRAMS[program]
    return {
        flag: action
        for action in parser._actions
        for flag in action.option_strings
        if action.dest not in ('help', 'version')
    }


def default(program, action):
    _, values = PROGRAMS[program]
    return action.timm_default if isinstance(action, Refused) else values[action.dest]


# -- timm's flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('program', PROGRAMS)
def test_every_flag_of_timm_is_known_under_all_its_names_with_its_default(program):
    known = actions(program)
    for flag, said in TIMM[f'{program}.py'].items():
        assert {flag, *said.get('names', [])} <= known.keys()
        assert len({known[name].dest for name in said.get('names', [flag])}) == 1
        found = default(program, known[flag])
        assert found == said['default'] and type(found) is type(said['default']), flag


def table():
    """Rows of docs/flags.md: program, spellings, default, what is said."""
    for line in (Path(ROOT) / 'docs' / 'flags.md').read_text().splitlines():
        if re.match(r'\| (both|train|validate) \|', line):
            program, names, said, note = (cell.strip() for cell in line.strip('|').split('|'))
            for one in PROGRAMS if program == 'both' else [program]:
                yield one, re.findall(r'`(-[\w-]+)`', names), said, note


def shown(value):
    if value is None or value is False:
        return 'none' if value is None else 'off'
    if value in ('', [], {}):
        return ''
    if isinstance(value, list):
        return '`' + ' '.join(f'{item:.4g}' if isinstance(item, float) else str(item) for item in value) + '`'
    return f'{value:g}' if isinstance(value, (int, float)) else f'`{value}`'


def test_the_table_lists_every_flag_as_it_is():
    rows = list(table())
    for program in PROGRAMS:
        known, listed = actions(program), {}
        for one, names, said, note in rows:
            if one != program:
                continue
            action = known[names[0]]
            assert names == action.option_strings
            assert action.dest not in listed, f'{names} stands twice in the table'
            listed[action.dest] = names
            assert said == shown(default(program, action)), names
            is_timms = bool(TIMM[f'{program}.py'].keys() & set(names))
            if isinstance(action, Refused):
                assert note == f'not supported: {action.reason}'
            else:
                assert re.match('as in timm(; .+)?$' if is_timms else 'ours: .+', note), names
        assert set(listed) == {action.dest for action in known.values()}


def test_the_tables_configuration_is_one(tmp_path):
    (example,) = re.findall(r'^```yaml\n(.*?)^```', (Path(ROOT) / 'docs/flags.md').read_text(), re.M | re.S)
    args = with_config(tmp_path, yaml.safe_load(example))
    assert args.lr == 3e-4 and args.model_kwargs == {'stem_width': 32} and args.gpd


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_is_printed(program, capsys):
    parse = parse_train_args if program == 'train' else parse_validate_args
    with pytest.raises(SystemExit):
        parse(['--help'])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in actions(program))


@pytest.mark.parametrize('program', PROGRAMS)
def test_what_is_refused_says_why_in_one_line(program):
    parse = parse_train_args if program == 'train' else parse_validate_args
    refused = {flag: action for flag, action in actions(program).items() if isinstance(action, Refused)}
    assert {'--torchscript', '--fuser', '--naflex-loader'} <= refused.keys()
    for flag, action in refused.items():
        assert action.dest not in PROGRAMS[program][1]
        for arguments in ([flag], [flag, '1']):
            with pytest.raises(UsageError, match=re.escape(action.reason)) as error:
                parse(arguments)
            assert str(error.value).startswith(flag) and '\n' not in str(error.value)


# -- configurations ---------------------------------------------------------------------------------------------------


def with_config(tmp_path, values, *arguments):
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(values))
    return parse_train_args(['--config', str(path), *arguments])


def test_a_configuration_of_valid_values(tmp_path):
    args = with_config(
        tmp_path,
        dict(
            sched='wsd',
            lr=3e-4,
            epochs=10,
            input_size=[3, 32, 32],
            mean=[0.5],
            amp=True,
            pretrained_cfg_overlay={'num_classes': 10},
            save_epochs=[4, 8],
            stop_epoch=None,
            torchcompile='inductor',
            experiment=2026,
        ),
        '--epochs',
        '20',
    )
    assert args.sched == 'wsd' and args.input_size == [3, 32, 32] and args.amp and args.save_epochs == [4, 8]
    assert args.pretrained_cfg_overlay == {'num_classes': 10} and args.stop_epoch is None
    assert args.epochs == 20 and args.experiment == '2026' and args.torchcompile == 'inductor'


def test_a_configuration_may_write_numbers_as_texts(tmp_path):
    args = with_config(tmp_path, dict(lr='3e-4', epochs='10', mean=['0.5', 0.4, '0.3'], drop_path=0))
    assert args.lr == 3e-4 and args.epochs == 10 and args.mean == [0.5, 0.4, 0.3]
    assert args.drop_path == 0.0 and isinstance(args.drop_path, float)


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(train_size_schedule='nope'), "train_size_schedule must be one of 'constant', 'progressive'"),
        (dict(lr='fast'), 'lr must be a number'),
        (dict(lr=True), 'lr must be a number'),
        (dict(epochs=1.5), 'epochs must be an integer'),
        (dict(epochs=None), 'epochs must have a value'),
        (dict(input_size=224), 'input_size must be a list'),
        (dict(input_size=[224, 224]), 'input_size must be a list of 3'),
        (dict(mean=[]), 'mean must be a list'),
        (dict(decay_milestones=[1, 'x']), 'decay_milestones must be an integer'),
        (dict(amp=1), 'amp must be true or false'),
        (dict(model=['resnet18']), 'model must be a name or a text'),
        (dict(model_kwargs='depth=3'), 'model_kwargs must be a mapping'),
        (dict(naflex_loader=True), '--naflex-loader is not supported'),
        (['lr', 0.1], 'is no mapping of arguments to values'),
    ],
)
def test_a_configuration_is_checked_as_a_command_is(tmp_path, values, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        with_config(tmp_path, values)
    assert '\n' not in str(error.value)


def test_unknown_keys_of_a_configuration_are_warned_about(tmp_path, caplog):
    args = with_config(tmp_path, {'lr': 0.5, 'not_an_arg': 1, 'batch-size': 3})
    assert args.lr == 0.5 and args.batch_size == 128
    assert 'batch-size, not_an_arg' in caplog.text


def test_every_default_is_a_value_of_a_configuration(tmp_path):
    """So a run's args.yaml is one; and so is that of a run of timm's, with what is refused here at its default."""
    _, values = PROGRAMS['train']
    assert vars(with_config(tmp_path, {**values, 'versions': {'timm': '1'}})) == {
        **values,
        'config': str(tmp_path / 'config.yaml'),
    }
    timms = {
        known.dest: said['default'] for flag, said in TIMM['train.py'].items() for known in [actions('train')[flag]]
    }
    args = vars(with_config(tmp_path, timms))
    assert {name: value for name, value in args.items() if name != 'config'} == {
        name: value for name, value in values.items() if name != 'config'
    }


def test_the_configuration_that_a_command_came_from_is_kept_with_old_flags_of_the_loss(tmp_path):
    first = parse_train_args(['--bce-loss', '--bce-pos-weight', '2', '--task', 'multilabel'])
    assert first.loss == 'bce' and first.loss_pos_weight == '2.0' and first.eval_metric == 'map'
    assert first.smoothing == 0.0
    again = with_config(tmp_path, vars(first))
    assert {**vars(again), 'config': ''} == vars(first)


# -- combinations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--task', 'multilabel', '--bce-loss', '--loss', 'asl'], '--bce-loss means --loss bce, and not asl'),
        (['--bce-pos-weight', '2', '--loss-pos-weight', '3'], '--bce-pos-weight means --loss-pos-weight'),
        (['--task', 'multilabel', '--loss', 'twoway', '--mixup', '0.5'], 'does not support Mixup/CutMix'),
        (['--task', 'multilabel', '--loss', 'zlpr', '--loss-pos-weight', '2'], 'only supported by bce'),
        (['--jsd-loss'], 'requires jsd_splits > 1'),
        (['--loss', 'zlpr'], 'requires multi-label targets'),
        (['--loss', 'focal'], "invalid choice: 'focal' (choose from 'ce', 'bce'"),
        (['--task', 'multilabel', '--loss-class-weight', 'missing.json'], 'missing.json'),
        (['--task', 'multilabel', '--class-stats', 'missing.json'], 'missing.json'),
        (['--task', 'multilabel', '--loss', 'db'], 'requires class_counts'),
        (['--task', 'multilabel', '--loss-pos-weight', 'neg_pos'], 'requires class stats'),
        (['--task', 'multilabel', '--class-stats', 'STATS', '--loss-pos-weight', 'inv_freq'], 'pos_weight methods are'),
        (['--task', 'multilabel', '--multilabel-threshold', '1'], '--multilabel-threshold must be above 0'),
        (['--target-format', 'multihot'], '--target-format multihot needs --task multilabel'),
        (['--task', 'multilabel', '--gpd'], '--gpd-loss sce compares probabilities of classes that exclude each other'),
        (
            ['--task', 'multilabel', '--kd-model-name', 'resnet18', '--kd-distill-type', 'feature,dkd'],
            '--kd-distill-type dkd compares probabilities',
        ),
        (['--aug-splits', '1'], '--aug-splits must be 0 or at least 2'),
        (['--aug-splits', '2', '--mixup', '0.1'], 'leave out --mixup'),
        (['--aug-splits', '2', '--no-aug'], 'leave out --no-aug'),
        (['--aug-splits', '2', '--no-prefetcher'], 'needs the prefetcher'),
        (['--aug-splits', '2', '--train-img-sizes', '32', '64'], 'do not go together'),
        (['--mixup-mode', 'half', '--no-prefetcher'], '--mixup-mode half needs the prefetcher'),
        (['--split-bn'], '--split-bn needs --aug-splits or --resplit'),
        (['--split-bn', '--resplit', '--sync-bn'], 'choose one'),
        (['--split-bn', '--resplit', '--gpd'], 'leave out --gpd or --split-bn'),
        (['--aug-repeats', '3'], '--aug-repeats needs several processes'),
        (['--train-batch-sizes', '3'], '--train-batch-sizes has 1 values and --train-img-sizes 0'),
        (['--train-img-sizes', '32', '64', '--train-size-probs', '1'], '--train-size-probs has 1 values'),
        (['--train-batches-per-epoch', '3'], '--train-batches-per-epoch needs --train-img-sizes'),
    ],
)
def test_flags_that_do_not_go_together_are_answered_in_one_line(tmp_path, arguments, message):
    (tmp_path / 'stats.json').write_text(json.dumps(dict(pos_counts=[2, 2, 1], num_samples=8)))
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        args = parse_train_args([str(tmp_path / 'stats.json') if text == 'STATS' else text for text in arguments])
        check_task(args)
        check_loaders(args)
    assert '\n' not in str(error.value)


# -- timm's documentation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Folder of 12 images for training and 4 for validation, of two classes."""
    root = tmp_path_factory.mktemp('pictures')
    for split, count in (('train', 6), ('validation', 2)):
        for label, color in (('a', (200, 30, 30)), ('b', (30, 30, 200))):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                Image.new('RGB', (40, 40), color).save(root / split / label / f'{index}.png')
    return root


def test_commands_of_timms_documentation_are_understood():
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        launcher, *arguments = shlex.split(command)
        if launcher == 'python':
            args = parse_validate_args(arguments[1:])
        else:
            args = parse_train_args(arguments[1:])
            check_task(args)
            check_loaders(args, world_size=int(arguments[0]))
        assert 'imagenet' in args.data_dir and not args.data


@pytest.mark.parametrize('command', [line for line in COMMANDS if 'validate.py' not in line])
def test_commands_of_timms_documentation_start(command, pictures, tmp_path):
    """With a small model on small images, and with --gpd behind what was there, where the two go together."""
    arguments = shlex.split(command)[2:]
    gpd = [] if '--split-bn' in arguments else ['--gpd']
    small = f'--data-dir {pictures} --model test_efficientnet --num-classes 2 --img-size 32 -b 6 -j 0 --device cpu'
    here = f'--epochs 1 --output {tmp_path} --experiment run'
    run('train.py', *arguments, *gpd, *small.split(), *here.split())
    assert os.path.exists(tmp_path / 'run' / 'student' / 'model.safetensors')
