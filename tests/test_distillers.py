"""Distillers between timm models of every kind, and the one pass their features come from."""

import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from timm import create_model
from torch.func import functional_call

from timm_gpd import expand
from timm_gpd.distillers import (
    DISTILLERS,
    Distillers,
    ModelOutput,
    distill_settings,
    example_output,
    tap_learner,
    tap_teacher,
)
from timm_gpd.distillers.feature_tap import Tap, stage_indices
from timm_gpd.losses import ofa_loss

CLASSES = 5
ALL = 'kd,feature,dkd,reviewkd,dist,ofa,nd,rkd,at,embed'
BOTH = {'stages': 'reviewkd', 'embedding': 'nd'}


def model(name, **kwargs):
    if 'vit' in name:
        kwargs['img_size'] = 64
    return create_model(name, num_classes=CLASSES, **kwargs)


def images(batch=4):
    return torch.randn(batch, 3, 64, 64)


def wave(*shape, pitch):
    return 2 * torch.sin(pitch * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def built(types, learner, teacher, loss_args=None):
    """Taps and distillers of a pair."""
    settings = distill_settings(types, loss_args)
    taps = tap_learner(learner, settings), tap_teacher(teacher, settings)
    return *taps, Distillers(settings, *(example_output(tap, images(2)) for tap in taps))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestTap:
    @pytest.mark.parametrize(
        'name, kwargs',
        [
            ('test_resnet', dict(drop_rate=0.3, drop_path_rate=0.2)),
            ('test_vit', dict(drop_rate=0.3, drop_path_rate=0.2)),
            ('test_efficientnet', dict(drop_rate=0.3)),
            ('mobilenetv4_conv_small_050', dict(drop_rate=0.3)),  # BatchNorm between pooling and classifier
        ],
    )
    def test_training_is_that_of_the_model(self, name, kwargs):
        """Same logits, gradients, random numbers and running statistics as without the tap."""
        plain, x = model(name, **kwargs).train(), images()
        tapped = model(name, **kwargs).train()
        tapped.load_state_dict(plain.state_dict())
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        output = Tap(tapped, BOTH)(x)
        assert torch.equal(output.logits, expected)
        expected.square().sum().backward()
        output.logits.square().sum().backward()
        for ours, theirs in zip(tapped.parameters(), plain.parameters()):
            assert torch.equal(ours.grad, theirs.grad)
        for ours, theirs in zip(tapped.buffers(), plain.buffers()):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'deit_tiny_distilled_patch16_224'])
    def test_embedding_is_timms(self, name):
        net = create_model(name, num_classes=CLASSES).eval()
        x = torch.randn(2, *net.pretrained_cfg['input_size'])
        with torch.no_grad():
            expected = net.forward_head(net.forward_features(x), pre_logits=True)
            torch.testing.assert_close(Tap(net, {'embedding': 'nd'})(x).embedding, expected)

    def test_one_pass_and_no_hook_left(self):
        net = model('test_resnet')
        calls = []
        for module in (net.conv1, net.layer4, net.fc):
            module.register_forward_hook(lambda module, *_: calls.append(module))
        output = Tap(net, BOTH)(images())
        assert calls == [net.conv1, net.layer4, net.fc]
        assert [stage.shape[1] for stage in output.stages] == [info['num_chs'] for info in net.feature_info[1:]]
        assert not net.fc._forward_pre_hooks

    def test_a_pass_that_fails_leaves_the_classifier(self):
        net = model('test_resnet')
        fc = net.fc
        hook = fc.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Tap(net, BOTH)(images())
        hook.remove()
        assert net.fc is fc and Tap(net, BOTH)(images()).embedding.shape == (4, fc.in_features)

    def test_nothing_asked_is_the_model(self):
        net, x = nn.Linear(3, 2), torch.randn(4, 3)
        output = Tap(net, {})(x)
        assert torch.equal(output.logits, net(x)) and output.stages == () and output.embedding is None

    def test_stages_are_the_ends_of_the_resolutions(self):
        assert stage_indices(create_model('resnet18')) == [1, 2, 3, 4]
        assert stage_indices(create_model('vit_tiny_patch16_224')) == [1, 3, 9, 11]
        assert stage_indices(create_model('levit_128s')) == [0, 1, 2]

    def test_example_output_changes_nothing(self):
        net = model('test_resnet').train()
        net.bn1.eval()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        example_output(Tap(net, BOTH), images())
        assert net.training and net.layer1[0].training and not net.bn1.training
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    def test_verify(self):
        class Surprising(type(model('test_resnet'))):
            def forward(self, x):
                return super().forward(x) * 2

        net = model('test_resnet')
        tap = Tap(net, BOTH)
        tap.verify(images())
        net.__class__ = Surprising
        with pytest.raises(ValueError, match='test_resnet has features that lead to other logits'):
            tap.verify(images())

    def test_models_that_lack_it_are_named_with_the_loss(self):
        plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        with pytest.raises(ValueError, match='^Sequential has no forward_features, which rkd would need: [^\n]*$'):
            tap_teacher(plain, distill_settings('kd,rkd'))
        net = model('test_resnet')
        net.forward_head, net.forward_features = net.forward_head, net.forward_features
        net.__class__ = nn.Module  # keeps nothing of the class but those two
        with pytest.raises(ValueError, match='test_resnet has no forward_intermediates, which reviewkd, at would'):
            tap_learner(net, distill_settings('reviewkd,at'))
        crossvit = create_model('crossvit_tiny_240', num_classes=CLASSES)
        with pytest.raises(ValueError, match='crossvit_tiny_240 has no single embedding, which nd would need'):
            tap_learner(crossvit, distill_settings('nd'))(torch.randn(1, 3, 240, 240))


class TestDistillers:
    @pytest.mark.parametrize(
        'learner, teacher',
        [
            ('test_resnet', 'test_vit'),
            ('test_vit', 'test_resnet'),
            ('test_vit', 'test_vit'),
            ('test_efficientnet', 'test_convnext'),
            ('mobilenetv4_conv_small_050', 'test_nfnet'),
        ],
    )
    def test_any_pair(self, learner, teacher):
        """Every loss tells the pair apart, and every parameter, of the learner and of the distillers, is trained."""
        net, static, x = model(learner), model(teacher), images(3)
        if not hasattr(static, 'forward_intermediates'):
            pytest.skip(f'{teacher} has no forward_intermediates in timm {timm.__version__}')
        *taps, distillers = built(ALL, net, static)
        with torch.no_grad():
            static_output = taps[1].eval()(x)
        terms = distillers(taps[0].train()(x), static_output, torch.tensor([0, 3, 3]))
        assert list(terms) == ALL.split(',')
        assert all(term.shape == () and 0 < term < math.inf for term in terms.values()), terms
        sum(terms.values()).backward()
        assert [name for name, p in [*net.named_parameters(), *distillers.named_parameters()] if p.grad is None] == []
        assert all(p.grad is None for p in static.parameters())

    @pytest.mark.parametrize('name', [name for name in DISTILLERS if name != 'token'])
    def test_each_alone_learns(self, name):
        learner, teacher, distillers = built(name, model('test_resnet'), model('test_vit'))
        x, target = images(8), torch.arange(8) % CLASSES
        with torch.no_grad():
            static_output = teacher.eval()(x)
        optimizer = torch.optim.Adam([*learner.parameters(), *distillers.parameters()], lr=1e-3)
        history = []
        for _ in range(8):
            loss = distillers(learner(x), static_output, target)[name]
            history.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert history[-1] < history[0]

    def test_student_and_dynamic_teacher(self):
        """Two learners of different widths, each in one pass, over one set of parameters."""
        student, static = model('test_resnet'), model('test_vit').eval()
        dynamic, x, target = expand(student), images(), torch.arange(4)
        settings = distill_settings('reviewkd,ofa,nd')
        static_output = example_output(tap_teacher(static, settings), x)

        def runner(inner, parameters):
            tap = tap_learner(inner, settings)
            return lambda x: functional_call(
                tap, {f'model.{name}': p for name, p in parameters().items()}, (x,), tie_weights=False
            )

        runs = {
            'student': runner(dynamic.student, dynamic.student_parameters),
            'dynamic_teacher': runner(dynamic.wide, dynamic.teacher_parameters),
        }
        distillers = nn.ModuleDict(
            {name: Distillers(settings, example_output(dynamic, x, run), static_output) for name, run in runs.items()}
        )
        dynamic.train()
        for name, run in runs.items():
            dynamic.zero_grad()
            sum(distillers[name](run(x), static_output, target).values()).backward()
            assert all(p.grad is not None for p in [*dynamic.wide.parameters(), *distillers[name].parameters()])
        widths = [distillers[name]['nd'].projection[0].num_features for name in runs]
        assert widths == [student.num_features, 2 * student.num_features]
        # the plain student knows nothing of them
        extracted = dynamic.extract_student()
        assert extracted.state_dict().keys() == student.state_dict().keys()
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in extracted.modules())

    def test_state_makes_the_same_losses(self):
        learner, teacher, distillers = built('reviewkd,ofa,nd', model('test_resnet'), model('test_vit'))
        other = built('reviewkd,ofa,nd', learner.model, teacher.model)[2]
        x, target = images(), torch.arange(4)
        output, static_output = example_output(learner, x), example_output(teacher, x)
        distillers(output, static_output, target)  # running statistics and centres move
        other.load_state_dict(distillers.state_dict())
        for ours, theirs in zip(
            distillers.eval()(output, static_output, target).values(),
            other.eval()(output, static_output, target).values(),
        ):
            assert torch.equal(ours, theirs)

    def test_weights(self):
        learner, teacher, distillers = built('dkd,at', model('test_resnet'), model('test_resnet'))
        weighted = built('dkd,at', learner.model, teacher.model, {'dkd.weight': 2, 'at.weight': 500})[2]
        output, static_output = example_output(learner, images()), example_output(teacher, images())
        terms, others = (
            distillers(output, static_output, torch.arange(4)),
            weighted(output, static_output, torch.arange(4)),
        )
        torch.testing.assert_close(others['dkd'], 2 * terms['dkd'])
        torch.testing.assert_close(others['at'], terms['at'] / 2)

    def test_class_counts_differ(self):
        settings = distill_settings('kd')
        with pytest.raises(ValueError, match='the static teacher has 7 classes and the student 5'):
            Distillers(settings, ModelOutput(torch.zeros(2, 5)), ModelOutput(torch.zeros(2, 7)))


class TestReviewKD:
    def test_against_the_authors_code(self):
        """Measured in float64 from megvii-research/mdistiller's ABF and hcl_loss with these weights and inputs."""
        learner = ModelOutput(
            wave(2, CLASSES, pitch=0.2),
            (wave(2, 4, 8, 8, pitch=0.3), wave(2, 6, 4, 4, pitch=0.5)),
            wave(2, 6, pitch=0.7),
        )
        teacher = ModelOutput(
            wave(2, CLASSES, pitch=0.2),
            (wave(2, 3, 6, 6, pitch=0.9), wave(2, 7, 3, 3, pitch=1.1)),
            wave(2, 8, pitch=1.3),
        )
        distiller = DISTILLERS['reviewkd'](learner, teacher, mid_channels=5).double()
        for level, fusion in enumerate(distiller.fusions):
            parts = [fusion.reduce, fusion.expand] + ([fusion.attention] if level < 2 else [])
            for index, parameter in enumerate(p for part in parts for p in part.parameters()):
                parameter.data = wave(*parameter.shape, pitch=0.4 + 0.1 * level + 0.05 * index) / 2
        loss = distiller(learner, teacher, torch.arange(2))
        torch.testing.assert_close(loss.item(), 6.82573002210579, rtol=1e-9, atol=0)

    def test_levels_are_paired_from_the_deepest(self):
        learner, teacher, distillers = built('reviewkd', model('test_resnet'), model('test_resnet'))
        output, static_output = example_output(learner, images()), example_output(teacher, images())
        short = static_output._replace(stages=static_output.stages[2:])
        distiller = DISTILLERS['reviewkd'](output, short)
        assert len(distillers['reviewkd'].fusions) == 5 and len(distiller.fusions) == 3
        widths = [*(stage.shape[1] for stage in short.stages), short.embedding.shape[1]]
        assert [fusion.expand[0].out_channels for fusion in distiller.fusions] == widths
        loss = distiller.eval()(output, short, torch.arange(4))
        for level in range(len(output.stages)):  # the two shallowest have no partner
            stages = [stage + 1 if index == level else stage for index, stage in enumerate(output.stages)]
            other = distiller(output._replace(stages=tuple(stages)), short, torch.arange(4))
            assert torch.equal(other, loss) == (level < 2), level


class TestOFA:
    def test_sums_the_loss_over_logits_and_stages(self):
        learner, teacher, distillers = built('ofa', model('test_resnet'), model('test_vit'), {'eps': 1.5})
        x, target = images(), torch.tensor([0, 4, 2, 2])
        output, static_output = example_output(learner, x), example_output(teacher, x)
        distiller = distillers['ofa'].eval()
        predictions = [output.logits] + [p(stage) for p, stage in zip(distiller.projectors, output.stages)]
        assert [p.shape for p in predictions] == [(4, CLASSES)] * 5
        expected = sum(ofa_loss(p, static_output.logits, target, eps=1.5) for p in predictions)
        torch.testing.assert_close(distiller(output, static_output, target), expected)

    @pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
    def test_projectors_follow_the_learner(self, name):
        learner, _, distillers = built('ofa', model(name), model('test_vit'))
        stages = example_output(learner, images()).stages
        for index, projector in enumerate(distillers['ofa'].projectors):
            convs = [m for m in projector.modules() if isinstance(m, nn.Conv2d)]
            assert convs[0].in_channels == stages[index].shape[1]
            assert math.prod(conv.stride[0] for conv in convs) == stages[index].shape[-1] // stages[-1].shape[-1]
            assert projector[-1].in_features == stages[-1].shape[1]


class TestND:
    def outputs(self, batch=6, width=4):
        return [ModelOutput(torch.randn(batch, CLASSES), (), torch.randn(batch, width)) for _ in range(2)]

    def test_centres_are_the_means_of_all_training_images(self):
        distiller = DISTILLERS['nd'](*self.outputs())
        seen, classes = [], []
        for _ in range(3):
            learner, teacher = self.outputs()
            target = torch.randint(CLASSES - 1, (6,))
            distiller(learner, teacher, target)
            seen.append(teacher.embedding)
            classes.append(target)
        seen, classes = torch.cat(seen), torch.cat(classes)
        for c in classes.unique():
            torch.testing.assert_close(distiller.class_centers[c], seen[classes == c].mean(0))
        assert distiller.class_centers[CLASSES - 1].eq(0).all()  # never seen
        before = distiller.class_centers.clone()
        distiller.eval()(*self.outputs(), target)
        assert torch.equal(distiller.class_centers, before)

    def test_projects_only_where_widths_differ(self):
        (learner, teacher), (wide, _) = self.outputs(), self.outputs(width=8)
        assert not list(DISTILLERS['nd'](learner, teacher).parameters())
        assert not list(DISTILLERS['feature'](learner, teacher).parameters())
        for name in ('nd', 'feature'):
            projected = DISTILLERS[name](wide, teacher).projection(wide.embedding)
            assert projected.shape == teacher.embedding.shape

    def test_centres_are_of_all_processes(self, tmp_path):
        mp.start_processes(
            _count_in_process, args=(str(tmp_path / 'store'), str(tmp_path)), nprocs=2, start_method='fork'
        )
        centers = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
        expected = torch.zeros(CLASSES, 2)
        expected[:3] = torch.tensor([1.0, 1.5, 2.0])[:, None]  # class 1 was seen by both
        assert torch.equal(centers[0], expected) and torch.equal(centers[1], expected)


def _count_in_process(rank, store, folder):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    embedding = torch.full((2, 2), rank + 1.0)
    output = ModelOutput(torch.zeros(2, CLASSES), (), embedding)
    distiller = DISTILLERS['nd'](output, output)
    distiller(output, output, torch.tensor([1, 2 * rank]))
    torch.save(distiller.class_centers, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


class TestSettings:
    def test_names_and_arguments(self):
        assert distill_settings('kd') == {'kd': {}}
        assert distill_settings('dkd, nd', {'beta': 2, 'nd.weight': 4.0}) == {'dkd': {'beta': 2}, 'nd': {'weight': 4.0}}
        assert distill_settings('dkd,dist', {'dist.beta': 2, 'alpha': 1}) == {'dkd': {'alpha': 1}, 'dist': {'beta': 2}}

    def test_temperature_is_that_of_kd(self):
        assert distill_settings('kd,dkd', temperature=2.0) == {'kd': {'temperature': 2.0}, 'dkd': {}}
        assert distill_settings('logit', {'temperature': 3}, temperature=2.0) == {'logit': {'temperature': 3}}
        assert distill_settings('dkd', temperature=2.0) == {'dkd': {}}

    @pytest.mark.parametrize(
        'types, loss_args, message',
        [
            ('kdd', {}, "'kdd' is not a distillation loss: choose of logit, kd, feature, dkd, rld"),
            ('dkd,', {}, "'' is not a distillation loss"),
            ('kd,logit', {}, 'names a distillation loss twice'),
            ('dkd,dist', {'beta': 1}, "'beta' could be of dkd or dist: choose of .*dkd.beta.*dist.beta"),
            ('dkd', {'gamma': 1}, "'gamma' is none: choose of dkd.weight, dkd.alpha, dkd.beta, dkd.temperature"),
            ('dkd', {'nd.weight': 1}, "'nd.weight' is none"),
            ('dkd', {'beta': 'two'}, "dkd.beta must be a number, but is 'two'"),
            ('dkd', {'beta': float('nan')}, 'dkd.beta must be a number, but is nan'),
            ('dkd', {'temperature': 0}, 'dkd.temperature must be more than 0, but is 0'),
            ('reviewkd', {'mid_channels': 2.5}, 'reviewkd.mid_channels must be an integer of at least 1, but is 2.5'),
        ],
    )
    def test_bad_input(self, types, loss_args, message):
        with pytest.raises(ValueError, match=message) as error:
            distill_settings(types, loss_args)
        assert '\n' not in str(error.value)
