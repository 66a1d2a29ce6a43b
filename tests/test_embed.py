"""The loss ``embed``: its geometry, and the static teacher's classifier in the student's place."""

import math

import pytest
import timm
import torch
import torch.nn as nn

from conftest import TINY_RESNET, small_resnet
from programs import run
from timm_gpd import DistillationTask, GapPreservingTask, StaticTeacherConfig
from timm_gpd.losses import embed_loss

REUSE = dict(distill_type='embed', distill_args={'reuse_classifier': True}, verbose=False)


def wide_teacher(**kwargs):
    """Twice as wide inside, and the same embedding."""
    return small_resnet(**{**dict(channels=(16, 16, 32, 16)), **kwargs}).eval()


def batch():
    return torch.randn(6, 3, 64, 64), torch.arange(6)


def train(task, steps=3):
    """A few steps with momentum and weight decay, as an optimiser of timm's would take them; the last result."""
    parameters = [parameter for parameter in task.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        result = task(*batch())
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    return result


class TestLoss:
    def embeddings(self):
        return torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)

    def test_formula(self):
        """Image by image and pair by pair."""
        student, teacher = self.embeddings()
        places = sum(math.dist(s, t) for s, t in zip(student.tolist(), teacher.tolist())) / 5
        gaps = [
            abs(
                math.dist(student[i].tolist(), student[j].tolist())
                - math.dist(teacher[i].tolist(), teacher[j].tolist())
            )
            for i in range(5)
            for j in range(i)
        ]
        expected = places + 3 * sum(gaps) / len(gaps)
        torch.testing.assert_close(embed_loss(student, teacher, 3.0).item(), expected, rtol=1e-12, atol=0)

    def test_distances_part(self):
        """At most twice the other, by the triangle inequality; moved and turned embeddings are as far apart."""
        student, teacher = self.embeddings()
        places = embed_loss(student, teacher, 0.0)
        gaps = embed_loss(student, teacher, 1.0) - places
        assert 0 < gaps <= 2 * places
        turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
        moved = teacher @ turn + 3
        torch.testing.assert_close(embed_loss(moved, teacher, 1.0), embed_loss(moved, teacher, 0.0))
        assert embed_loss(moved, teacher, 1.0) > 1

    def test_at_the_goal(self):
        """0, with a gradient that is a number: norms have none at 0."""
        _, teacher = self.embeddings()
        student = teacher.clone().requires_grad_()
        loss = embed_loss(student, teacher)
        loss.backward()
        assert loss.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))

    def test_the_teacher_gets_no_gradient(self):
        student, teacher = self.embeddings()
        teacher.requires_grad_()
        embed_loss(student, teacher).backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0

    def test_half_precision(self):
        """Distances are small differences: autocast leaves them alone."""
        student, teacher = (tensor.detach().float() for tensor in self.embeddings())
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(embed_loss(student, teacher), embed_loss(student.clone(), teacher))
            assert embed_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize(
        'shapes, message',
        [
            (((5, 7), (5, 8)), 'embeddings of one width, but they have 7 .student. and 8 .teacher.'),
            (((1, 7), (1, 7)), 'give it at least 2'),
        ],
    )
    def test_bad_input(self, shapes, message):
        with pytest.raises(ValueError, match=message):
            embed_loss(*map(torch.randn, shapes))


class TestDistiller:
    @pytest.mark.parametrize('static', [wide_teacher, lambda: wide_teacher(channels=(16, 16, 32, 64))])
    def test_both_learners(self, static):
        """Each with a projection where its own width differs from the teacher's, which trains with it."""
        task = GapPreservingTask(small_resnet(), static_teacher=static(), distill_type='embed', verbose=False)
        result = train(task, steps=1)
        width = task.static_teacher.teacher.model.num_features
        for name, own in (('student', 16), ('dynamic_teacher', 32)):
            projection = task.get_learners().step_loss.distillers[name]['embed'].projection
            assert isinstance(projection, nn.Identity if own == width else nn.Linear)
            assert all(parameter.grad.abs().sum() > 0 for parameter in projection.parameters())
        assert result['kd/embed'] > 0 and result['teacher_kd/embed'] > 0

    def test_a_teacher_without_one_embedding(self):
        teacher = timm.create_model('crossvit_9_240', num_classes=10, embed_dim=(16, 32), num_heads=(2, 2))
        with pytest.raises(ValueError, match='crossvit_9_240 has no single embedding, which embed would need') as error:
            DistillationTask(
                small_resnet(),
                StaticTeacherConfig(teacher, img_size=240),
                distill_type='embed',
                verbose=False,
            )
        assert '\n' not in str(error.value)


class TestReusedClassifier:
    @pytest.mark.parametrize('kind', [GapPreservingTask, DistillationTask])
    def test_stays_the_teachers(self, kind):
        """After training with weight decay; and the student's logits are it, of the student's embedding."""
        student, teacher = small_resnet(), wide_teacher()
        own = student.fc.weight.clone()
        task = kind(student, static_teacher=teacher, **REUSE)
        train(task)
        trained = task.get_student() if kind is GapPreservingTask else student
        plain = small_resnet().eval()
        plain.load_state_dict(trained.state_dict())  # an ordinary model
        for name, tensor in teacher.fc.state_dict().items():
            assert torch.equal(plain.fc.state_dict()[name], tensor)
        x, _ = batch()
        embedding = plain.forward_head(plain.forward_features(x), pre_logits=True)
        torch.testing.assert_close(plain(x), teacher.fc(embedding))
        assert not torch.equal(
            plain.conv1[0].weight if isinstance(plain.conv1, nn.Sequential) else plain.conv1.weight, own
        )
        if kind is GapPreservingTask:
            assert torch.equal(student.fc.weight, own) and student.fc.weight.requires_grad  # which stays as it was

    def test_of_a_teacher_whose_outputs_are_stored(self, tmp_path):
        student, teacher = small_resnet(), wide_teacher()
        DistillationTask(student, StaticTeacherConfig(teacher, cache=str(tmp_path)), **REUSE)
        assert torch.equal(student.fc.weight, teacher.fc.weight) and not student.fc.weight.requires_grad

    def test_without_it_the_classifier_is_the_students(self):
        student, teacher = small_resnet(), wide_teacher()
        before = student.fc.weight.clone()
        task = DistillationTask(student, teacher, distill_type='embed', verbose=False)
        assert torch.equal(student.fc.weight, before)
        train(task)
        assert not torch.equal(student.fc.weight, before)

    def test_of_one_of_several_teachers(self):
        teachers, student = [wide_teacher(), wide_teacher()], small_resnet()
        arguments = {'embed@2.reuse_classifier': True}
        DistillationTask(student, teachers, distill_type='embed@1,embed@2', distill_args=arguments, verbose=False)
        assert torch.equal(student.fc.weight, teachers[1].fc.weight)

    @pytest.mark.parametrize(
        'teacher, arguments, message',
        [
            (
                lambda: wide_teacher(channels=(8, 8, 16, 24)),
                {},
                "the student's classifier has weight 10 x 16, bias 10 and the static teacher's weight 10 x 24, bias 10",
            ),
            (
                lambda: StaticTeacherConfig(wide_teacher(num_classes=12), class_map=range(10)),
                {},
                'the static teacher has other classes, with a class map',
            ),
            (
                lambda: [wide_teacher(), wide_teacher()],
                dict(
                    distill_type='embed@1,embed@2',
                    distill_args={'embed@1.reuse_classifier': True, 'embed@2.reuse_classifier': 'true'},
                ),
                'embed@1 and embed@2 would both give the student a classifier',
            ),
            (wide_teacher, dict(distill_args={'reuse_classifier': 3}), 'embed.reuse_classifier must be true or false'),
        ],
    )
    @pytest.mark.parametrize('kind', [GapPreservingTask, DistillationTask])
    def test_refused(self, kind, teacher, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            kind(small_resnet(), static_teacher=teacher(), **{**REUSE, **arguments})
        assert '\n' not in str(error.value)

    def test_two_classifiers(self):
        student = timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, depth=1, num_classes=10)
        with pytest.raises(ValueError, match='the student, is without a single classifier'):
            DistillationTask(student, wide_teacher(), **REUSE)

    def test_by_command(self, tmp_path):
        """With phases and GPD: handed over, saved and published, it is the teacher's."""
        channels = 'channels=(16,32,32,64)'
        digits = ['--config', 'configs/digits.yaml', '--data-dir', tmp_path, '--output', tmp_path, '--epochs', 2]
        digits += ['--warmup-epochs', 0, '--digits-train-size', 100]
        run('train.py', *digits, '--experiment', 'teacher', '--model-kwargs', channels, 'stem_width=4', '--epochs', 1)
        folder = f'local-dir:{tmp_path / "teacher" / "student"}'
        losses = [
            '--kd-model-name',
            folder,
            '--kd-distill-type',
            'embed,kd',
            '--kd-loss-args',
            'embed.reuse_classifier=true',
        ]
        run('train.py', *digits, '--experiment', 'run', *losses, '--gpd', '--gpd-epochs', '0-1')
        found = timm.create_model(f'local-dir:{tmp_path / "run" / "student"}', pretrained=True, **TINY_RESNET)
        teacher = timm.create_model(folder, pretrained=True, **{**TINY_RESNET, 'channels': (16, 32, 32, 64)})
        assert torch.equal(found.fc.weight, teacher.fc.weight) and torch.equal(found.fc.bias, teacher.fc.bias)
