"""The authors' checkpoints become plain timm students."""

import argparse
import dataclasses
import os

import pytest
import timm
import torch

from authors_format import SMALL, checkpoint, resnet18_student
from timm_gpd.expansion.verify import relative_error
from timm_gpd.models.releases import RELEASES, convert_checkpoint, convert_state_dict, is_release


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Narrower or shallower than the released ones, laid out alike."""
    for name, (_, _, model_args) in SMALL.items():
        monkeypatch.setitem(RELEASES, name, dataclasses.replace(RELEASES[name], model_args=model_args))


def student_of(name, state_dict):
    model = timm.create_model(name, num_classes=5, **SMALL[name][2]).double().eval()
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize('name', SMALL)
def test_logits_are_those_of_the_authors_student(name):
    make_teacher, run_student, _ = SMALL[name]
    tensors = make_teacher()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    architecture, state_dict = convert_state_dict(checkpoint(tensors))
    assert architecture == name
    with torch.no_grad():
        assert relative_error(student_of(name, state_dict)(x), run_student(tensors, x)) < 1e-10


@pytest.mark.parametrize('branch', range(6))
def test_every_branch_counts(branch):
    """Each branch changes the student, and is read as the convolution that it stands for."""
    tensors = SMALL['resnet18'][0]()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for key, tensor in tensors.items():
        if key.endswith('.vector'):
            tensor[[row for row in range(6) if row != branch]] = 0
    alone = student_of('resnet18', convert_state_dict(checkpoint(tensors))[1])
    with torch.no_grad():
        logits = alone(x)
        assert relative_error(logits, resnet18_student(tensors, x)) < 1e-10
        for key, tensor in tensors.items():
            if key.endswith('.vector'):
                tensor[branch] *= 2
        assert relative_error(resnet18_student(tensors, x), logits) > 1e-3


def test_a_norm_that_never_ran_as_student_has_the_teachers_statistics():
    tensors = SMALL['resnet18'][0]()
    tensors['bn1.tiny_running_mean'].zero_()
    state_dict = convert_state_dict(checkpoint(tensors))[1]
    assert torch.equal(state_dict['bn1.running_mean'], tensors['bn1.running_mean'][:64])
    assert torch.equal(state_dict['bn1.running_var'], tensors['bn1.running_var'][:64])


def test_a_file_with_arguments_and_averaged_weights(tmp_path):
    """The weights that the published accuracies belong to are read, not their average."""
    tensors = SMALL['resnet18'][0]()
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    path = tmp_path / 'resnet18.pth.tar'
    wrapped = {f'module.{name}': tensor for name, tensor in tensors.items()}
    torch.save(checkpoint(wrapped, state_dict_ema=averaged), path)
    architecture, state_dict = convert_checkpoint(str(path))
    expected = convert_state_dict(checkpoint(tensors))[1]
    assert architecture == 'resnet18' and state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())


def test_nothing_of_the_teacher_is_kept_alive(tmp_path):
    """The student's tensors do not hold on to the larger ones that they were cut from."""
    tensors = SMALL['rvt_tiny'][0]()
    state_dict = convert_state_dict(checkpoint(tensors))[1]
    for tensor in state_dict.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_execute_code_is_refused(tmp_path):
    path, witness = tmp_path / 'evil.pth.tar', tmp_path / 'executed'
    torch.save(checkpoint({'bn1.tiny_running_mean': torch.zeros(2)}, extra=Payload(str(witness))), path)
    with pytest.raises(ValueError, match='could run code when loaded: refused') as error:
        convert_checkpoint(str(path))
    assert '\n' not in str(error.value) and not witness.exists()


def spoil(case, path):
    tensors = SMALL['resnet18'][0]()
    saved = checkpoint(tensors)
    if case == 'plain':
        saved = timm.create_model('test_resnet').state_dict()
    elif case == 'list':
        saved = [1, 2]
    elif case == 'branches':
        saved['args'] = argparse.Namespace(num_branches_orepa=3)
    elif case == 'other model':
        saved['state_dict'] = {f'net.{name}': tensor for name, tensor in tensors.items()}
    elif case == 'deeper model':
        tensors['layer1.2.conv1.weight'] = tensors['layer2.0.conv1.weight']
    elif case == 'missing branch':
        del tensors['layer3.1.conv1.weight_orepa_prior']
    elif case == 'wrong shape':
        tensors['layer3.1.conv1.vector'] = torch.zeros(6, 5, dtype=torch.float64)
    torch.save(saved, path)
    if case == 'truncated':
        with open(path, 'r+b') as file:
            file.truncate(path.stat().st_size // 2)
    elif case == 'text':
        path.write_text('<html>not found</html>')
    elif case == 'empty':
        path.write_bytes(b'')


@pytest.mark.parametrize(
    'case, message',
    [
        ('plain', 'needs no conversion'),
        ('list', 'holds a list, not a checkpoint'),
        ('branches', 'num_branches_orepa 3'),
        ('other model', "none of the authors' released models"),
        ('deeper model', 'is not of a resnet18: layer1.2.conv1.weight'),
        ('missing branch', 'layer3.1.conv1 of the checkpoint is not laid out'),
        ('wrong shape', 'layer3.1.conv1 of the checkpoint is not laid out'),
        ('truncated', 'truncated or corrupted'),
        ('text', 'truncated or corrupted'),
        ('empty', 'truncated or corrupted'),
    ],
)
def test_errors_are_one_line(case, message, tmp_path):
    path = tmp_path / 'spoilt.pth.tar'
    spoil(case, path)
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(str(path))
    assert '\n' not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match='there is no checkpoint at'):
        convert_checkpoint(str(tmp_path / 'none.pth.tar'))


def test_plain_checkpoints_are_told_apart():
    assert not is_release(timm.create_model('test_resnet').state_dict())
    assert is_release(checkpoint(SMALL['resnet18'][0]()))
