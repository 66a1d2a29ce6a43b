"""Publishing and fetching through huggingface_hub's own client, from a server that speaks the Hub's protocol."""

import argparse
import json
import lzma
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, __version__
from safetensors.torch import load_file

from authors_format import SMALL, checkpoint
from hub_server import TOKEN, HubServer
from timm_gpd import hub
from timm_gpd.models.releases import convert_checkpoint
from timm_gpd.student_folder import STUDENT_FILES, save_student
from timm_gpd.training.args import parse_train_args

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARGS = [
    '--gpd',
    '--gpd-branches',
    '3',
    '--model',
    'test_resnet',
    '--model-kwargs',
    'channels=[8,16,32,64]',
    'stem_width=4',
    '--num-classes',
    '10',
    '--input-size',
    '1',
    '32',
    '32',
    '--mean',
    '0.5',
    '--std',
    '0.5',
    '--dataset',
    'digits',
    '--data-dir',
    '/home/someone/data',
    '--lr',
    '0.1',
]
# Earlier versions keep what arrived of a file, and the next pull goes on behind it.
CONTINUES = tuple(map(int, __version__.split('.')[:2])) < (1, 18)
LEFT_BY_DOWNLOADS = ('.safetensors',) if CONTINUES else ('.safetensors', '.incomplete')
SUMMARY = (
    'epoch,train_loss,eval_loss,eval_top1,eval_top5,eval_teacher_top1,lr\n'
    '0,2.0,1.5,61.25,91.5,63.5,0.1\n1,1.0,0.5,93.125,99.5,94.75,0.01\n'
)


@pytest.fixture(scope='module')
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(server):
    server.faults.clear()
    server.requests.clear()


@pytest.fixture(scope='module')
def environment(server, tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
    return {
        **environment,
        'HF_ENDPOINT': server.url,
        'HF_HOME': str(tmp_path_factory.mktemp('hf')),
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'HF_TOKEN': TOKEN,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': ROOT,
    }


@pytest.fixture(scope='module')
def cli(environment):
    """Runs ``python -m timm_gpd.hub`` with the given arguments, in a process that is kept."""
    with subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'tests', 'hub_client.py')],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(*argv, code=0, token=TOKEN, offline=False):
            request = {'argv': [str(arg) for arg in argv], 'env': {'HF_TOKEN': token}, 'offline': offline}
            process.stdin.write(json.dumps(request) + '\n')
            process.stdin.flush()
            result = SimpleNamespace(**json.loads(process.stdout.readline()))
            assert result.code == code, result.stderr
            if code:
                assert result.stderr.count('\n') == 1 and result.stderr.startswith('timm_gpd.hub: error: ')
            return result

        yield run
        process.stdin.close()


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """What train.py leaves, with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('runs') / 'digits'
    folder.mkdir()
    args = parse_train_args(ARGS)
    student = _student()
    (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    (folder / 'summary.csv').write_text(SUMMARY)
    (folder / 'gap.png').write_bytes(b'\x89PNG' + bytes(range(256)) * 8)
    save_student(
        student,
        str(folder / 'student'),
        vars(args),
        dict(top1=93.125, top5=99.5, teacher_top1=94.75),
        str(folder / 'gap.png'),
    )
    averaged = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    common = dict(arch='test_resnet', epoch=0, state_dict=student.state_dict(), task_state={})
    torch.save({**common, 'args': argparse.Namespace(**vars(args))}, folder / 'checkpoint-0.pth.tar')
    # Version 0.1.0 noted the arguments after the data was found.
    resolved = argparse.Namespace(**{**vars(args), 'dataset': '', 'data_dir': '/home/someone/data/digits-300-42'})
    torch.save({**common, 'args': resolved, 'state_dict_ema': averaged}, folder / 'averaged.pth.tar')
    return folder


def _student():
    student = timm.create_model('test_resnet', channels=(8, 16, 32, 64), stem_width=4, num_classes=10, in_chans=1)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


def _contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def _head(server, repo_id, revision='main'):
    repo = server.repos[repo_id]
    return repo.commits[repo.refs[revision]]


def test_push_and_pull_bring_everything_back(server, cli, run_folder, tmp_path):
    assert cli('push', run_folder, '--repo-id', 'me/digits').stdout == f'{server.url}/me/digits\n'
    cli('pull', 'me/digits', tmp_path / 'pulled')
    pulled, local = _contents(tmp_path / 'pulled'), _contents(run_folder / 'student')
    assert set(pulled) == set(local) == set(STUDENT_FILES)
    assert all(pulled[name] == local[name] for name in local if name != 'README.md')
    assert pulled['README.md'].decode() == local['README.md'].decode().replace(
        'local-dir:path/to/this/folder', 'hf-hub:me/digits'
    )
    assert not any(path.endswith(('.bin', '.tar', '.pkl')) for path in _head(server, 'me/digits'))
    card = ModelCard.load(tmp_path / 'pulled' / 'README.md')
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        'top-1 (%)': 93.125,
        'top-5 (%)': 99.5,
    }
    assert 'someone' not in card.content and '"gpd_branches": 3' in card.content
    assert cli('pull', 'me/digits', tmp_path / 'pulled', code=2).stderr.endswith('choose another folder\n')


def test_timm_alone_loads_it(server, cli, run_folder, environment):
    cli('push', run_folder, '--repo-id', 'me/loaded', '--private')
    code = (
        'import sys, timm; model = timm.create_model("hf-hub:me/loaded", pretrained=True); '
        'assert "timm_gpd" not in sys.modules; from safetensors.torch import load_file; expected = load_file({!r}); '
        'state = model.state_dict(); assert all(state[name].equal(expected[name]) for name in state); '
        'print(type(model).__name__, model.num_classes, model.pretrained_cfg["architecture"], '
        'tuple(model.pretrained_cfg["input_size"]))'.format(str(run_folder / 'student' / 'model.safetensors'))
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd='/', env={**environment, 'PYTHONPATH': ''}
    )
    assert result.stdout == 'ResNet 10 test_resnet (1, 32, 32)\n', result.stderr


def test_it_is_a_static_teacher(server, cli, run_folder, environment):
    """By its name on the Hub, beside another one in a folder."""
    cli('push', run_folder, '--repo-id', 'me/teacher', '--private')
    folder = f'local-dir:{run_folder / "student"}'
    code = (
        'import timm, torch; from timm_gpd import GapPreservingTask; '
        f'student = timm.create_model({folder!r}); '
        f'task = GapPreservingTask(student, ["hf-hub:me/teacher", {folder!r}], verbose=False); '
        f'expected = timm.create_model({folder!r}, pretrained=True).eval()(torch.ones(1, 1, 32, 32)).softmax(1); '
        'print(torch.allclose(task.static_teacher(torch.ones(1, 1, 32, 32)).logits.softmax(1), expected, atol=1e-5))'
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd='/', env={**environment, 'PYTHONPATH': ROOT}
    )
    assert result.stdout == 'True\n', result.stderr


@pytest.mark.parametrize('name', ['checkpoint-0', 'averaged'])
def test_a_checkpoint_gives_its_own_epoch(server, cli, run_folder, tmp_path, name):
    cli('push', run_folder / f'{name}.pth.tar', '--repo-id', f'me/{name}')
    cli('pull', f'me/{name}', tmp_path / 'pulled')
    expected = torch.load(run_folder / f'{name}.pth.tar', weights_only=False)
    expected = expected['state_dict_ema' if name == 'averaged' else 'state_dict']
    weights = load_file(tmp_path / 'pulled' / 'model.safetensors')
    assert weights.keys() == expected.keys() and all(weights[key].equal(expected[key]) for key in weights)
    card = ModelCard.load(tmp_path / 'pulled' / 'README.md')
    assert card.data.eval_results[0].metric_value == 61.25 and card.data.eval_results[0].dataset_name == 'digits'
    assert (tmp_path / 'pulled' / 'gap.png').read_bytes() == (run_folder / 'gap.png').read_bytes()


@pytest.mark.parametrize('name', ['gpd', 'full'])
def test_a_checkpoint_from_before_the_package_had_rooms(tmp_path, name):
    """Its arguments are those that version 0.1.0 had made of the command."""
    checkpoint = tmp_path / 'last.pth.tar'
    with lzma.open(os.path.join(ROOT, 'tests', 'fixtures', 'flat_layout', name, 'last.pth.tar.xz')) as file:
        checkpoint.write_bytes(file.read())
    lines = hub.push(str(checkpoint), 'me/old', dry_run=True).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ['model.safetensors', 'config.json', 'README.md']


def test_a_checkpoint_whose_command_left_the_classes_to_the_model(tmp_path):
    student = timm.create_model('test_resnet')
    args = argparse.Namespace(**vars(parse_train_args(['--model', 'test_resnet', '--data-dir', 'images'])))
    assert args.num_classes is None
    torch.save(dict(args=args, epoch=0, state_dict=student.state_dict()), tmp_path / 'last.pth.tar')
    lines = hub.push(str(tmp_path / 'last.pth.tar'), 'me/new', dry_run=True).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ['model.safetensors', 'config.json', 'README.md']


def test_dry_run_contacts_nothing(server, cli, run_folder):
    lines = cli('push', run_folder, '--repo-id', 'me/dry', '--dry-run').stdout.splitlines()
    size = (run_folder / 'student' / 'model.safetensors').stat().st_size
    assert lines[:2] == ['Would upload to me/dry:', f'  model.safetensors ({size:,} bytes)'] and len(lines) == 5
    assert not server.requests


def test_private(server, cli, run_folder, tmp_path):
    cli('push', run_folder, '--repo-id', 'me/secret', '--private')
    assert server.repos['me/secret'].private
    assert 'was not found' in cli('pull', 'me/secret', tmp_path / 'pulled', token='', code=2).stderr
    cli('push', run_folder, '--repo-id', 'me/open')
    commits = len(server.repos['me/open'].commits)
    error = cli('push', run_folder / 'averaged.pth.tar', '--repo-id', 'me/open', '--private', code=2).stderr
    assert 'is public' in error
    assert len(server.repos['me/open'].commits) == commits


def test_revision_and_pull_request_leave_main_alone(server, cli, run_folder, tmp_path):
    repo_id = 'me/branches'
    result = cli('push', run_folder, '--repo-id', repo_id, '--revision', 'epoch-1')
    assert result.stdout == f'{server.url}/{repo_id}/tree/epoch-1\n'
    cli('push', run_folder / 'averaged.pth.tar', '--repo-id', repo_id, '--revision', 'epoch-1')
    result = cli('push', run_folder, '--repo-id', repo_id, '--create-pr')
    assert result.stdout == f'{server.url}/{repo_id}/discussions/1\n'
    assert not _head(server, repo_id)
    assert set(_head(server, repo_id, 'epoch-1')) == set(_head(server, repo_id, 'refs/pr/1')) == set(STUDENT_FILES)
    cli('pull', repo_id, tmp_path / 'pr', '--revision', 'refs/pr/1')
    assert _contents(tmp_path / 'pr')['model.safetensors'] == _contents(run_folder / 'student')['model.safetensors']
    assert 'no revision epoch-2' in cli('pull', repo_id, tmp_path / 'none', '--revision', 'epoch-2', code=2).stderr
    assert (
        'leave out --revision'
        in cli('push', run_folder, '--repo-id', repo_id, '--create-pr', '--revision', 'a', code=2).stderr
    )


def test_a_refused_token(server, cli, run_folder, tmp_path):
    error = cli('push', run_folder, '--repo-id', 'me/refused', token='hf_wrong', code=2).stderr
    assert 'refused the token' in error and 'HF_TOKEN' in error and '401' in error
    assert '(403)' in cli('push', run_folder, '--repo-id', 'others/refused', code=2).stderr
    assert 'me/refused' not in server.repos and 'others/refused' not in server.repos
    cli('push', run_folder, '--repo-id', 'me/accepted')
    assert 'refused the token' in cli('pull', 'me/accepted', tmp_path / 'pulled', token='hf_wrong', code=2).stderr
    assert not (tmp_path / 'pulled').exists()


@pytest.mark.parametrize('fault', ['drop_lfs', 'drop_commit'])
def test_an_interrupted_push_leaves_the_repo_as_it_was(server, cli, run_folder, fault):
    repo_id = f'me/{fault}'
    cli('push', run_folder / 'averaged.pth.tar', '--repo-id', repo_id)
    before = _head(server, repo_id)
    server.lfs.clear()
    server.faults.add(fault)
    assert 'run the same command again' in cli('push', run_folder, '--repo-id', repo_id, code=2).stderr
    assert _head(server, repo_id) is before
    server.faults.clear()
    server.requests.clear()
    cli('push', run_folder, '--repo-id', repo_id)
    assert _head(server, repo_id)['model.safetensors'] == _contents(run_folder / 'student')['model.safetensors']
    if fault == 'drop_commit':  # what arrived the first time is not sent again
        assert not any(method == 'PUT' for method, _ in server.requests)


@pytest.mark.parametrize('fault', ['short', 'cut', 'corrupt'])
def test_a_damaged_download_is_refused_and_not_kept(server, cli, run_folder, environment, tmp_path, fault):
    cli('push', run_folder, '--repo-id', f'me/{fault}')
    server.faults.add(fault)
    error = cli('pull', f'me/{fault}', tmp_path / 'pulled', code=2).stderr
    assert ('arrived damaged' if fault == 'corrupt' else 'broke off') in error and 'again' in error
    assert os.listdir(tmp_path) == []
    cached = os.path.join(environment['HF_HOME'], 'hub', f'models--me--{fault}')
    names = [name for _, _, names in os.walk(cached) for name in names]
    assert 'config.json' in names and not [name for name in names if name.endswith(LEFT_BY_DOWNLOADS)]
    server.faults.clear()
    cli('pull', f'me/{fault}', tmp_path / 'pulled')
    assert _contents(tmp_path / 'pulled')['model.safetensors'] == _contents(run_folder / 'student')['model.safetensors']


def test_a_server_out_of_reach(server, cli, run_folder, environment, tmp_path):
    cli('push', run_folder, '--repo-id', 'me/cached')
    cli('pull', 'me/cached', tmp_path / 'first')
    server.stop()
    try:
        error = cli('push', run_folder, '--repo-id', 'me/away', code=2).stderr
        assert server.url in error and 'HF_ENDPOINT' in error
        error = cli('pull', 'me/away', tmp_path / 'away', code=2).stderr
        assert 'cannot be reached' in error and 'HF_HUB_CACHE' in error and 'HF_HUB_OFFLINE' in error
        assert not (tmp_path / 'away').exists()
        cli('pull', 'me/cached', tmp_path / 'second')
    finally:
        server.start()
    cli('pull', 'me/cached', tmp_path / 'third', offline=True)
    assert _contents(tmp_path / 'first') == _contents(tmp_path / 'second') == _contents(tmp_path / 'third')
    assert 'HF_HUB_OFFLINE is set' in cli('pull', 'me/away', tmp_path / 'away', offline=True, code=2).stderr
    assert 'HF_HUB_OFFLINE is set' in cli('push', run_folder, '--repo-id', 'me/away', offline=True, code=2).stderr


def test_what_is_no_student(server, cli, run_folder, tmp_path):
    def error(source, *more):
        return cli('push', source, '--repo-id', 'me/none', *more, code=2).stderr

    assert 'does not exist' in error(tmp_path / 'nowhere')
    assert 'no model.safetensors' in error(tmp_path)
    (tmp_path / 'args.yaml').write_text('model: resnet18\n')
    assert 'did not finish' in error(tmp_path)
    (tmp_path / 'text').write_text('not a checkpoint')
    assert 'checkpoint of train.py' in error(tmp_path / 'text')
    torch.save({'state_dict': {}}, tmp_path / 'weights.pth')
    assert 'lacks args' in error(tmp_path / 'weights.pth')
    torch.save({'args': _Harmful(tmp_path / 'harm')}, tmp_path / 'harmful.pth')
    assert 'checkpoint of train.py' in error(tmp_path / 'harmful.pth')
    assert not (tmp_path / 'harm').exists()
    assert '--repo-id' in cli('push', run_folder, code=2).stderr
    assert '--repo-id me/' in cli('push', run_folder, '--repo-id', 'a/b/c', code=2).stderr
    assert 'was not found' in cli('pull', 'me/never', tmp_path / 'out', code=2).stderr
    assert not server.repos.keys() & {'me/none'}


class _Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_converted_checkpoint_is_a_folder_to_push(server, cli, tmp_path, capsys):
    released = str(tmp_path / 'released.pth.tar')
    torch.save(checkpoint(SMALL['mobilenetv1_100'][0]()), released)
    assert hub.main(['convert', released, str(tmp_path / 'out')]) == 0
    assert capsys.readouterr().out == f'{tmp_path / "out"}\n'
    student = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    _, state_dict = convert_checkpoint(released)
    assert all(tensor.equal(state_dict[name].to(tensor)) for name, tensor in student.state_dict().items())
    assert any(type(module) is torch.nn.ReLU for module in student.modules())  # the authors', where timm has ReLU6
    cli('push', tmp_path / 'out', '--repo-id', 'me/converted')
    assert b'released.pth.tar' in _head(server, 'me/converted')['README.md']
    assert hub.main(['convert', released, str(tmp_path / 'out')]) == 2
    assert hub.main(['convert', str(tmp_path / 'missing'), str(tmp_path / 'other')]) == 2
    torch.save(timm.create_model('test_vit').state_dict(), released)
    assert hub.main(['convert', released, str(tmp_path / 'other')]) == 2
    assert sorted(os.listdir(tmp_path)) == ['out', 'released.pth.tar']
    assert capsys.readouterr().err.count('\n') == 3
