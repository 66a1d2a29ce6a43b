"""Ranking by DisWOT: distances that are 0 where functions are the same, and the command around them."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import small_resnet
from exactness import randomize_
from timm_gpd import expand, rank_students
from timm_gpd.errors import InputError
from timm_gpd.rank import compare_networks
from timm_gpd.rank.command import main, parse_rank_args
from timm_gpd.rank.networks import random_networks
from timm_gpd.rank.similarity import compare_fingerprints, take_fingerprint
from timm_gpd.rank.students import random_batches

SHAPES = {
    'resnet': lambda: small_resnet(),
    'vit': lambda: timm.create_model('test_vit', img_size=64, embed_dim=32, num_heads=2, depth=2, num_classes=10),
    'convnext': lambda: timm.create_model('test_convnext', dims=(8, 8, 16, 16), num_classes=10),
    'efficientnet': lambda: timm.create_model('test_efficientnet', num_classes=10),
}


def batch(size=6, classes=10):
    return random_batches(1, size, (3, 64, 64), classes, seed=1)[0]


def double_batch():
    images, target = batch()
    return images.double(), target


class TestDistances:
    @pytest.mark.parametrize('name', SHAPES)
    def test_a_dynamic_teacher_is_its_student_at_the_start(self, name):
        """Replicas are averaged; other weights of the same shape are far away."""
        student, data = randomize_(SHAPES[name]()).double(), double_batch()
        other = randomize_(SHAPES[name](), seed=1).double()
        for teacher in (expand(student, 2, num_branches=2), expand(student, 3, noise=0.0)):
            assert -1e-12 < compare_networks(teacher, student, *data).score <= 0
        apart = compare_networks(teacher, other, *data)
        assert apart.relation > 1e-6 and apart.semantic > 1e-2 and apart.score == -(apart.relation + apart.semantic)

    def test_it_is_no_longer_once_it_has_trained(self):
        student, data = small_resnet().double(), double_batch()
        teacher = expand(student)
        with torch.no_grad():
            for parameter in teacher.wide.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std(unbiased=False))
        assert compare_networks(teacher, student, *data).score < -1e-3

    @pytest.mark.parametrize('name', SHAPES)
    def test_is_symmetric(self, name):
        first, second = randomize_(SHAPES['resnet']()), randomize_(SHAPES[name](), seed=1)
        forwards, backwards = compare_networks(first, second, *batch()), compare_networks(second, first, *batch())
        assert forwards.semantic > 1e-2
        torch.testing.assert_close(forwards, backwards, rtol=1e-9, atol=0)

    def test_does_not_know_the_order_of_channels(self):
        """The last stage's channels in another order, with the classifier that fits: the same function."""
        net, other = randomize_(small_resnet()).double(), randomize_(small_resnet(), seed=1).double()
        permuted = small_resnet().double()
        permuted.load_state_dict(net.state_dict())
        order = torch.randperm(16)
        block = permuted.layer4[0]
        with torch.no_grad():
            for module in (block.conv2, block.bn2, *(m for m in block.downsample if list(m.parameters()))):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.dim():
                        tensor.copy_(tensor[order])
            permuted.fc.weight.copy_(permuted.fc.weight[:, order])
        data = double_batch()
        fingerprints = [take_fingerprint(model, *data) for model in (net, permuted)]
        torch.testing.assert_close(fingerprints[1].gradient, fingerprints[0].gradient[:, order])
        assert not torch.allclose(fingerprints[1].gradient, fingerprints[0].gradient)
        assert compare_fingerprints(*fingerprints).score > -1e-12
        torch.testing.assert_close(compare_networks(permuted, other, *data), compare_networks(net, other, *data))

    def test_formulas(self):
        """Against matrices of images by images, and of channels by channels for every class."""
        student, teacher, data = randomize_(small_resnet()), randomize_(small_resnet(), seed=1), batch()
        of_both = [take_fingerprint(model, *data) for model in (teacher, student)]
        grams = [self.unit_rows(self.last_map(model, data[0])) for model in (teacher, student)]
        relation = sum((a - b) ** 2 for a, b in zip(*(gram.flatten() for gram in grams))) / len(data[0]) ** 2
        semantic = 0
        for rows in zip(*(fingerprint.gradient for fingerprint in of_both)):
            student_gram, *both = (self.unit_rows(row.sort().values[:, None]) for row in (rows[1], rows[0], -rows[0]))
            semantic += min((gram - student_gram).square().sum() for gram in both) / 16 / 10
        found = compare_fingerprints(*of_both)
        torch.testing.assert_close(found.relation, relation.item(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.semantic, semantic.item(), rtol=1e-9, atol=0)

    @staticmethod
    def unit_rows(x):
        return F.normalize(x.double() @ x.double().T)

    @staticmethod
    def last_map(model, images):
        return model.train().forward_features(images).detach().flatten(1)

    def test_the_gradient_is_that_of_the_classifier(self):
        model, (images, target) = randomize_(small_resnet()), batch()
        fingerprint = take_fingerprint(model, images, target)
        F.cross_entropy(model.train()(images), target).backward()
        torch.testing.assert_close(fingerprint.gradient.float(), model.fc.weight.grad, rtol=1e-4, atol=1e-6)

    def test_leaves_models_as_they_were(self):
        model = small_resnet(drop_rate=0.5)
        model.layer1.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [(module.training, getattr(module, 'track_running_stats', None)) for module in model.modules()]
        take_fingerprint(model, *batch())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert [(m.training, getattr(m, 'track_running_stats', None)) for m in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())


class TestRandomNetworks:
    def test_depth_shows(self):
        """timm's own start has residual blocks that are nothing, and then their weights do not matter."""
        model, (images, _) = small_resnet(), batch()
        timms = model.eval()(images)
        nn.init.zeros_(model.layer3[0].conv2.weight)
        assert torch.equal(model(images), timms)
        network = next(random_networks(model, [0]))
        drawn = network.train()(images)
        nn.init.zeros_(network.layer3[0].conv2.weight)
        assert not torch.allclose(network(images), drawn, rtol=0.1)

    def test_seeds(self):
        images, _ = batch()
        one, two, again = (network.eval()(images) for network in random_networks(small_resnet(), [1, 2, 1]))
        assert torch.equal(one, again) and not torch.allclose(one, two)

    @pytest.mark.parametrize('number', [1, 2, 6])
    def test_kernels_of_any_number_of_branches_are_of_one_size(self, number):
        teacher = expand(small_resnet(channels=(16, 16, 16, 16)), 2, number, noise=0.0, scale='teacher')
        wide = next(random_networks(teacher, [0]))
        for conv in (wide.layer2[0].conv1, wide.layer3[0].conv2):
            fan_in = conv.weight[0].numel()
            assert conv.weight.shape[0] == 32
            assert 0.9 < (conv.weight.std() * fan_in**0.5).item() < 1.1
        for kernel in [module for module in teacher.branches.modules() if hasattr(module, 'gamma')]:
            assert kernel.gamma.abs().min() > 0


class TestRankStudents:
    def models(self):
        """Of one that is named, tables are drawn when it is made."""
        return dict(a=small_resnet(), b=SHAPES['convnext'](), c='test_vit')

    def test_order_and_what_else_is_ranked_do_not_matter(self):
        """So nothing is left of one student, such as a gradient, when the next has its turn; nor of the caller's."""
        models, data, teacher = self.models(), [batch(), batch(4)], small_resnet()
        for parameter in models['a'].parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {name: tensor.clone() for name, tensor in models['a'].state_dict().items()}
        state = torch.get_rng_state()
        ranked = rank_students(teacher, models, data, initializations=2, num_classes=10)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], tensor) for name, tensor in models['a'].state_dict().items())
        assert all((parameter.grad == 1).all() for parameter in models['a'].parameters())
        assert [student.score for student in ranked] == sorted((s.score for s in ranked), reverse=True)
        assert ranked[0].name == 'a'  # of the teacher's kind
        (alone,) = rank_students(small_resnet(), {'c': 'test_vit'}, data, initializations=2, num_classes=10)
        in_company = next(student for student in ranked if student.name == 'c')
        assert (alone.score, alone.deviation, alone.relation) == pytest.approx(
            (in_company.score, in_company.deviation, in_company.relation)
        )

    def test_means_over_pairs_and_batches(self):
        data = [batch(), batch(4)]
        (ranked,) = rank_students(small_resnet(), [small_resnet()], data, initializations=2, seed=3)
        scores = [
            [
                compare_networks(teacher, student, *one).score
                for teacher in self.drawn([3_000_009, 3_000_010])
                for one in data
            ]
            for student in self.drawn([3_000_011, 3_000_012])
        ]
        means = torch.tensor(scores).mean(1)
        assert ranked.score == pytest.approx(means.mean().item(), rel=1e-4)
        assert ranked.deviation == pytest.approx(means.std().item(), rel=1e-3)

    @staticmethod
    def drawn(seeds):
        return [next(random_networks(small_resnet(), [seed])) for seed in seeds]

    def test_names(self):
        (ranked,) = rank_students('test_resnet', ['test_vit'], [batch()], initializations=1, num_classes=10)
        assert ranked.name == 'test_vit' and ranked.deviation is None and ranked.score < 0

    def test_costs(self):
        model = small_resnet()
        (ranked,) = rank_students(model, [model], [batch()], initializations=1)
        counted = []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda m, _, y: counted.append(y.numel() * m.weight[0].numel()))
        model.eval()(batch()[0][:1])
        assert ranked.cost.macs == sum(counted)
        assert ranked.cost.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert ranked.cost.milliseconds > 0

    def test_ratios_and_branches(self):
        """Of one student, against itself: fresh wide models, for at the start they are all the student."""
        student = small_resnet()
        ranked = rank_students(None, [student], [batch()], ratios=[2, 3], branches=[1, 2], initializations=1)
        assert len(ranked) == 4 and all(one.score < -1e-3 for one in ranked)
        by_name = {one.name: one.cost for one in ranked}
        assert by_name['test_resnet, ratio 3, 1 branch'].macs > by_name['test_resnet, ratio 2, 1 branch'].macs
        two, one = by_name['test_resnet, ratio 2, 2 branches'], by_name['test_resnet, ratio 2, 1 branch']
        assert two.macs == one.macs and two.parameters > one.parameters
        other = rank_students(SHAPES['vit'](), [student], [batch()], ratios=[2], initializations=1)
        assert [one.name for one in other] == ['test_resnet, ratio 2, 1 branch']

    @pytest.mark.parametrize(
        'arguments, message',
        [
            (dict(students=[]), 'the list of students is empty'),
            (dict(students='test_vit'), 'students are a list'),
            (dict(students=['test_vit', 'test_vit']), 'test_vit is among the students twice'),
            (dict(students=['test_vit', 'test_resnet'], ratios=[2]), 'ranked for one student, but there are 2'),
            (dict(teacher=None), 'no teacher is given'),
            (dict(students=['test_vitt']), 'test_vitt cannot be created'),
            (dict(students=[3]), 'a network is a name or a model, but not 3'),
            (dict(batches=[]), 'the list of batches is empty'),
            (dict(initializations=0), 'initializations must be integers of at least 1, but there is 0'),
            (dict(ratios=[2.5]), 'ratios must be integers of at least 1, but there is 2.5'),
            (dict(batches=[batch(1)]), 'relations among images: give at least 2, not 1'),
            (dict(batches=[batch(classes=12)]), 'test_resnet has 10 classes and a label is 11'),
            (dict(students={'narrow': small_resnet(num_classes=12)}), 'of 10 and of 12 classes cannot be compared'),
            (dict(students={'headless': small_resnet(num_classes=0)}), 'headless has no classifier'),
            (
                dict(students={'large': timm.create_model('deit_tiny_patch16_224', num_classes=10, depth=1)}),
                'large takes no images of 3 x 64 x 64',
            ),
            (
                dict(students={'own': nn.Linear(3, 10)}),
                'Linear has no forward_features, which relation, semantic would need',
            ),
        ],
    )
    def test_bad_input(self, arguments, message):
        given = dict(
            teacher=small_resnet(), students=['test_vit'], batches=[batch(2)], initializations=1, num_classes=10
        )
        with pytest.raises(InputError, match=message) as error:
            rank_students(**{**given, **arguments})
        assert '\n' not in str(error.value)


DIGITS = ['--dataset', 'digits', '--input-size', '1', '32', '32', '--mean', '0.5', '--std', '0.5', '-b', '8']


def command(*arguments):
    """Runs the command in this process: its exit code, and the two streams."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(list(map(str, arguments)))
    return code, stdout.getvalue(), stderr.getvalue()


class TestCommand:
    def test_a_table_a_chart_and_json(self, tmp_path):
        pytest.importorskip('matplotlib')
        paths = tmp_path / 'ranking.json', tmp_path / 'ranking.png'
        arguments = ['--teacher', 'test_resnet', '--students', 'test_vit,test_convnext', '--initializations', 2]
        where = ['--data-dir', tmp_path, '--json', paths[0], '--plot', paths[1]]
        code, out, error = command(*arguments, *DIGITS, *where)
        assert code == 0, error
        title, header, *lines = out.splitlines()
        assert title == 'against test_resnet: 1 batch of 8 images of digits, 1 x 32 x 32, 10 classes'
        assert header.split()[:3] == ['student', 'score', '±']
        found = json.loads(paths[0].read_text())
        assert [line.split()[:2] for line in lines] == [[s['name'], f'{s["score"]:.4f}'] for s in found['students']]
        assert found['students'][0]['score'] >= found['students'][1]['score']
        assert found['data'] == 'images of digits' and found['num_classes'] == 10
        assert paths[1].read_bytes().startswith(b'\x89PNG')
        again = command(*arguments, *DIGITS, *where)[1]
        assert [line.split()[:5] for line in again.splitlines()] == [line.split()[:5] for line in out.splitlines()]

    def test_without_data(self):
        code, out, _ = command('--students', 'test_resnet', '--ratios', '1,2', '--img-size', 32, '-b', 4)
        assert code == 0
        assert out.startswith('against test_resnet: 1 batch of 4 random images and labels, 3 x 32 x 32, 1000 classes\n')
        assert {line.split('  ')[0] for line in out.splitlines()[2:]} == {
            f'test_resnet, ratio {ratio}, 1 branch' for ratio in (1, 2)
        }

    @pytest.mark.parametrize(
        'arguments, message',
        [
            (['--teacher', 'test_resnet'], '--students is empty: name at least one'),
            (['--teacher', 'test_resnet', '--students', 'a,,b'], '--students a,,b has an empty place'),
            (['--students', 'test_resnet'], 'no teacher: give --teacher, or --ratios'),
            (['--teacher', 'resnet1', '--students', 'test_vit'], '--teacher resnet1 is unknown: models of names like'),
            (['--teacher', 'test_vit', '--students', 'resnet1'], '--students resnet1 is unknown: models of names like'),
            (['--students', 'test_vit', '--ratios', '2,x'], '--ratios takes positive integers with commas'),
            (['--students', 'test_vit', '--branches', '7'], 'num_branches must be a positive integer of at most 6'),
            (['--students', 'test_vit,test_resnet', '--ratios', '2'], 'ranked for one student, but there are 2'),
            (['--students', 'test_vit', '--ratios', '2', '-b', '1'], '--batch-size must be at least 2'),
            (['--students', 'test_vit', '--ratios', '2', '--batches', '0'], '--batches must be a positive integer'),
            (['--students', 'test_vit', '--ratios', '2', '--data-dir', 'none'], 'dataset folder none does not exist'),
            (['--students', 'test_vit', '--ratios', '2', '--plot', 'a.jpg'], '--plot a.jpg must end in .png or .pdf'),
            (['--students', 'test_vit', '--ratios', '2', '--json', 'none/a'], '--json none/a cannot be written'),
            (['--students', 'test_vit', '--ratios', '2', '--device', 'x'], 'device x cannot be used'),
            (['--students', 'test_vit', '--ratios', '2', '--task', 'multilabel'], '--task multilabel has no classes'),
            (
                ['--teacher', 'test_resnet', '--students', 'test_vit', '--img-size', '20'],
                'test_vit takes no images of|cannot',
            ),
        ],
    )
    def test_bad_input(self, arguments, message):
        code, out, error = command('--initializations', 1, '-b', 2, *arguments)
        assert code == 2 and out == ''
        assert re.match(f'timm_gpd.rank: error: .*({message})', error), error
        assert error.count('\n') == 1

    def test_the_pages_commands_are_understood(self):
        page = (Path(__file__).parents[1] / 'docs' / 'rank.md').read_text()
        commands = re.findall(r'^python -m timm_gpd\.rank (.*)', page.replace('\\\n', ' '), re.M)
        assert len(commands) == 5
        for line in commands:
            args = parse_rank_args(shlex.split(line))
            assert args.students and (args.teacher or args.ratios)

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
        code, _, error = command('--students', 'test_vit', '--ratios', '2', '--plot', 'a.png')
        assert (code, error) == (2, 'timm_gpd.rank: error: --plot needs matplotlib: pip install "timm-gpd[demo]"\n')

    def test_too_few_images(self, tmp_path):
        code, _, error = command(
            *('--students', 'test_resnet', '--ratios', '2', '--data-dir', tmp_path, *DIGITS),
            *('-b', 150, '--batches', 3),
        )
        assert code == 2 and 'the train split has 2 batches of 150 images, and --batches is 3' in error
