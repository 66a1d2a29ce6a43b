"""Losses against formulas written out image by image, and against numbers measured from the code of their authors."""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_gpd.losses import (
    GPD_LOSSES,
    at_loss,
    check_finite,
    dist_loss,
    dkd_loss,
    hcl_loss,
    kd_loss,
    nd_loss,
    needs_target,
    nkd_loss,
    ofa_loss,
    rkd_loss,
    rld_loss,
    rsd_loss,
    soft_target_cross_entropy,
    standardize_logits,
    wttm_loss,
)

CLASSES = 10


def wave(*shape, pitch):
    """Reproducible inputs without a random generator."""
    return 2 * torch.sin(pitch * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


@pytest.fixture
def logits():
    return wave(6, CLASSES, pitch=0.7), wave(6, CLASSES, pitch=1.3)


@pytest.fixture
def target():
    return torch.tensor([3, 0, 9, 3, 5, 1])


@pytest.fixture
def embeddings():
    return wave(6, 8, pitch=0.9), wave(6, 8, pitch=1.7)


@pytest.fixture
def maps():
    return (
        [wave(2, 4, 8, 8, pitch=0.3), wave(2, 6, 4, 4, pitch=0.5), wave(2, 6, 1, 1, pitch=0.7)],
        [wave(2, 4, 8, 8, pitch=0.9), wave(2, 6, 4, 4, pitch=1.1), wave(2, 6, 1, 1, pitch=1.3)],
    )


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=0)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


class TestAgainstTheAuthorsCode:
    """Values measured in float64 from the published code on these inputs.

    kd and nd: KD++ (WangYZ1608/Knowledge-Distillation-via-ND); dkd, rkd, hcl and at: megvii-research/mdistiller;
    dist and ofa: Hao840/OFAKD; rld, also standardised: zju-SWJ/RLD; nkd: yzd-v/cls_KD; wttm: zkxufo/TTM; rsd: the code
    published with arXiv 2507.21844.
    """

    def test_logits(self, logits, target):
        close(kd_loss(*logits), 1.9386299969883496)
        close(dkd_loss(*logits, target, alpha=1.0, beta=2.0, temperature=3.0), 3.9869007322945644)
        close(dist_loss(*logits, beta=1.0, gamma=2.0, temperature=3.0), 27.517683123396125)
        close(ofa_loss(*logits, target, eps=1.5, temperature=2.0), 1.1703477802909057)
        close(rld_loss(*logits, target), 7.130761599540096)
        close(rld_loss(*logits, target, standardize=True), 3.3845637199476872)
        others = dict(alpha=0.5, beta=2.0, temperature=1.0, alpha_temperature=2.0)
        close(rld_loss(*logits, target, **others), 1.4570031428085255)
        close(rld_loss(*logits, target, **others, standardize=True), 0.7601410896515274)
        close(nkd_loss(*logits, target), 4.7241290580316795)
        close(nkd_loss(*logits, target, gamma=0.5, temperature=2.0), 5.070997474105254)
        close(wttm_loss(*logits), 4.6246596553959956)
        close(wttm_loss(*logits, gamma=0.5), 2.6887714781576153)

    def test_embeddings(self, embeddings, target):
        centers = wave(CLASSES, 8, pitch=2.3)
        close(nd_loss(*embeddings, centers, target), 1.0238732298024136)
        mixed = 0.3 * F.one_hot(target, CLASSES).double() + 0.7 * F.one_hot(target.flip(0), CLASSES).double()
        close(nd_loss(*embeddings, centers, mixed), 0.9975291881896338)
        close(rkd_loss(embeddings[0], wave(6, 12, pitch=1.1)), 1.880794261992222)
        close(rsd_loss(*embeddings), 11.992889690666576)
        close(rsd_loss(*embeddings, kappa=0.1), 14.498494416622187)

    def test_maps(self, maps):
        close(hcl_loss(*maps), 8.647524913313001)
        teacher = [wave(2, 3, 6, 6, pitch=0.9), wave(2, 5, 7, 7, pitch=1.1), wave(2, 2, 1, 1, pitch=1.3)]
        close(at_loss(maps[0], teacher), 0.02830029050682171)


class TestAgainstThePapersFormulas:
    def test_soft_target_cross_entropy(self, logits):
        expected = 0.0
        for s, t in zip(*map(torch.Tensor.tolist, logits)):
            labels = [0.8 * p + 0.2 / CLASSES for p in softmax(t)]
            expected -= sum(label * math.log(p) for label, p in zip(labels, softmax(s))) / 6
        close(soft_target_cross_entropy(*logits, smoothing=0.2), expected)

    def test_kd(self, logits):
        expected = sum(kl(softmax(t, 2), softmax(s, 2)) * 4 / 6 for s, t in zip(*map(torch.Tensor.tolist, logits)))
        close(kd_loss(*logits, temperature=2.0), expected)

    def test_dkd(self, logits, target):
        expected = 0.0
        for s, t, c in zip(*map(torch.Tensor.tolist, logits), target.tolist()):
            p, q = softmax(t, 1.5), softmax(s, 1.5)
            binary = kl([p[c], 1 - p[c]], [q[c], 1 - q[c]])
            others = kl(softmax(t[:c] + t[c + 1 :], 1.5), softmax(s[:c] + s[c + 1 :], 1.5))
            expected += (0.3 * binary + 4 * others) * 1.5**2 / 6
        close(dkd_loss(*logits, target, alpha=0.3, beta=4.0, temperature=1.5), expected)

    def test_dist(self, logits):
        p, q = (x.softmax(-1) for x in logits)

        def distance(a, b):
            return 1 - sum(torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(a, b)) / len(a)

        close(dist_loss(*logits, beta=0.5, gamma=3.0), 0.5 * distance(p, q) + 3 * distance(p.T, q.T), rtol=1e-5)

    def test_ofa(self, logits, target):
        expected = 0.0
        for s, t, c in zip(*map(torch.Tensor.tolist, logits), target.tolist()):
            p, q = softmax(t), softmax(s)
            expected -= sum((p[k] ** 1.4 if k != c else (1 + p[k]) ** 1.4 - 1) * math.log(q[k]) for k in range(CLASSES))
        close(ofa_loss(*logits, target, eps=1.4), expected / 6)

    def test_nd(self, embeddings, target):
        centers = wave(CLASSES, 8, pitch=2.3)
        expected = 0.0
        for s, t, c in zip(*embeddings, target):
            cosine = (s @ centers[c]) / (s.norm() * centers[c].norm())
            expected += (1 - cosine * s.norm() / max(s.norm(), t.norm())) / 6
        close(nd_loss(*embeddings, centers, target), expected)

    def test_rkd(self, embeddings):
        def huber(x, y):
            return (x - y) ** 2 / 2 if abs(x - y) < 1 else abs(x - y) - 0.5

        def distances(e):
            d = [[(a - b).norm().item() for b in e] for a in e]
            mean = sum(map(sum, d)) / 30
            return [x / mean for row in d for x in row]

        def angles(e):
            unit = [[F.normalize(b - a, dim=0) for b in e] for a in e]
            return [(unit[i][j] @ unit[i][k]).item() for i in range(6) for j in range(6) for k in range(6)]

        s, t = embeddings[0], wave(6, 12, pitch=1.1)
        distance = sum(map(huber, distances(s), distances(t))) / 36
        angle = sum(map(huber, angles(s), angles(t))) / 216
        close(rkd_loss(s, t, distance_weight=2.0, angle_weight=3.0), 2 * distance + 3 * angle)

    def test_hcl(self, maps):
        def cells(x, count):
            step = x.shape[-1] // count
            return torch.stack(
                [
                    x[:, :, i * step : (i + 1) * step, j * step : (j + 1) * step].mean((2, 3))
                    for i in range(count)
                    for j in range(count)
                ]
            )

        expected = 0.0
        for (s, t), counts in zip(zip(*maps), ([4, 2, 1], [2, 1], [])):
            levels = [((s - t) ** 2).mean()] + [((cells(s, n) - cells(t, n)) ** 2).mean() for n in counts]
            weights = [0.5**level for level in range(len(levels))]
            expected += sum(w * x for w, x in zip(weights, levels)) / sum(weights)
        close(hcl_loss(*maps), expected)

    def test_at(self, maps):
        expected = 0.0
        for s, t in zip(*maps):
            a, b = ((x.abs() ** 3).mean(1).flatten(1) for x in (s, t))
            expected += ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).mean()
        close(at_loss(*maps, p=3.0), expected)


class TestProperties:
    def test_zero_for_a_perfect_student(self, logits, target, embeddings, maps):
        teacher = logits[1]
        perfect = [
            kd_loss(teacher, teacher),
            dkd_loss(teacher, teacher, target),
            dist_loss(teacher, teacher),
            rld_loss(teacher, teacher, teacher.argmax(1)),
            rkd_loss(embeddings[1] * 3, embeddings[1]),  # relations do not see the scale
            hcl_loss(maps[1], maps[1]),
            at_loss([5 * x for x in maps[1]], maps[1]),
            nd_loss(embeddings[1], embeddings[1], embeddings[1] * 7, torch.arange(6)),
        ]
        for loss in perfect:
            assert abs(loss.item()) < 1e-5  # DIST divides by a norm plus 1e-8

    def test_no_gradient_for_the_teacher(self, logits, target, embeddings, maps):
        def losses(s, t, e, f, a, b):
            yield from (loss(s, t, *([target] if needs_target(loss) else [])) for loss in GPD_LOSSES.values())
            yield from (kd_loss(s, t), dkd_loss(s, t, target), rld_loss(s, t, target), dist_loss(s, t))
            yield from (ofa_loss(s, t, target), rsd_loss(s, t))
            yield from (nd_loss(e, f, wave(CLASSES, 8, pitch=2.3), target), rkd_loss(e, f))
            yield from (hcl_loss([a], [b]), at_loss([a], [b]))

        tensors = [x.clone().requires_grad_() for x in (*logits, *embeddings, maps[0][0], maps[1][0])]
        for loss in losses(*tensors):
            loss.backward()
        for student, teacher in zip(tensors[::2], tensors[1::2]):
            assert student.grad.norm() > 0
            assert teacher.grad is None

    def test_dkd_reweights_kd(self, logits, target):
        """Eq. 6 of its paper: KD is DKD with beta = 1 - the teacher's probability of the target."""
        for s, t, c in zip(*logits, target):
            beta = 1 - t.softmax(-1)[c].item()
            close(dkd_loss(s[None], t[None], c[None], alpha=1.0, beta=beta), kd_loss(s[None], t[None], 1.0))

    def test_rld_is_dkd_where_the_teacher_is_right(self, logits, target):
        right = logits[1].argmax(1)
        assert not torch.equal(right, target)
        for standardize in (False, True):
            weights = dict(alpha=0.7, beta=3.0, temperature=2.0, standardize=standardize)
            refined = [rld_loss(*logits, classes, **weights, alpha_temperature=2.0) for classes in (right, target)]
            plain = [dkd_loss(*logits, classes, **weights) for classes in (right, target)]
            close(refined[0], plain[0].item())
            assert abs(refined[1] - plain[1]) > 0.1

    def test_rld_of_a_teacher_that_gives_the_target_the_least(self):
        student, teacher = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True), torch.tensor([[-1.0, 3.0, 0.0]])
        (loss := rld_loss(student, teacher, torch.tensor([0]), alpha=0.0)).backward()
        assert loss == 0 and not student.grad.any()
        (loss := rld_loss(student, teacher, torch.tensor([0]))).backward()
        assert loss > 1 and student.grad[0, 0] < 0 and student.grad.isfinite().all()

    def test_rsd_wants_features_like_the_teachers_and_unlike_each_other(self):
        features = torch.randn(64, 5, dtype=torch.float64)
        independent = torch.linalg.qr(features - features.mean(0))[0]
        assert rsd_loss(3 * independent + 1, independent) < 1e-6  # neither scale nor shift matter
        swapped = independent[:, [1, 0, 2, 3, 4]]
        close(rsd_loss(swapped, independent, kappa=0.5), 2 + 2 * 0.5, rtol=1e-3)
        with pytest.raises(ValueError, match='of one width, but they have 4'):
            rsd_loss(independent[:, :4], independent)
        with pytest.raises(ValueError, match='give it at least 2'):
            rsd_loss(independent[:1], independent[:1])

    def test_nkd_is_image_by_image(self, logits, target):
        for gamma, temperature in ((1.5, 1.0), (0.5, 2.0)):
            total = 0.0
            for s, t, c in zip(*logits, target.tolist()):
                s, t = s.tolist(), t.tolist()
                total -= softmax(t)[c] * math.log(softmax(s)[c])
                s, t = (softmax([x / temperature for i, x in enumerate(row) if i != c]) for row in (s, t))
                total -= gamma * temperature**2 * sum(b * math.log(a) for a, b in zip(s, t))
            close(nkd_loss(*logits, target, gamma, temperature), total / len(target))

    def test_wttm_is_image_by_image(self, logits):
        for gamma in (0.2, 1.0):
            total = 0.0
            for s, t in zip(*logits):
                powers = [p**gamma for p in softmax(t.tolist())]
                total += sum(powers) * kl([p / sum(powers) for p in powers], softmax(s.tolist()))
            close(wttm_loss(*logits, gamma), total / len(logits[0]))
        close(wttm_loss(*logits, 1.0), kd_loss(*logits, 1.0))  # an untempered teacher

    def test_standardized_logits_do_not_see_scale_and_shift(self, logits, target):
        student, teacher = logits
        close(standardize_logits(teacher).mean(-1) + 1, torch.ones(6), rtol=1e-12)
        close(standardize_logits(teacher).std(-1), torch.ones(6), rtol=1e-6)
        for loss in (
            lambda s, t: kd_loss(s, t, 2.0, standardize=True),
            lambda s, t: dkd_loss(s, t, target, standardize=True),
        ):
            close(loss(3 * student + 5, 0.5 * teacher - 1), loss(student, teacher), rtol=1e-5)
            assert abs(loss(4 * teacher, teacher).item()) < 1e-9

    def test_dkd_of_a_saturated_student(self):
        """Its probability of the target rounds to 1, so that of the rest to 0: by hand, log 1 and log exp(-200)."""
        student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
        loss = dkd_loss(student, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
        p = softmax([1.0, 2.0, 3.0])
        binary = p[0] * math.log(p[0]) + (1 - p[0]) * (math.log(1 - p[0]) + 200)
        second, third = softmax([2.0, 3.0])  # the student's are exp(-200) and 1
        others = second * (math.log(second) + 200) + third * math.log(third)
        close(loss, binary + 0.5 * others, rtol=1e-6)
        loss.backward()
        # d binary: 1 - p[0] moves from the target to the rest, all of which is the third class; d others likewise.
        expected = torch.tensor([[1 - p[0], -0.5 * second, -(1 - p[0]) + 0.5 * second]])
        torch.testing.assert_close(student.grad, expected)

    def test_gradients(self, logits, target, embeddings):
        assert torch.autograd.gradcheck(lambda s: dkd_loss(s, logits[1], target), logits[0].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda s: dist_loss(s, logits[1]), logits[0].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda s: rkd_loss(s, embeddings[1]), embeddings[0].clone().requires_grad_())

    @pytest.mark.parametrize('name', GPD_LOSSES)
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision_costs_its_rounding_only(self, name, dtype):
        """Of products of small numbers it would leave 0 over 0."""
        student, teacher = (20 * wave(6, 100, pitch=pitch).to(dtype) for pitch in (0.7, 1.3))
        rest = [torch.arange(6)] if needs_target(GPD_LOSSES[name]) else []
        with torch.autocast('cpu', dtype):
            loss = GPD_LOSSES[name](student, teacher, *rest)
        close(loss.double(), GPD_LOSSES[name](student.double(), teacher.double(), *rest), rtol=1e-2)

    def test_ofa_with_eps_1_is_soft_cross_entropy(self, logits, target):
        close(ofa_loss(*logits, target), soft_target_cross_entropy(*logits, smoothing=0.0))

    def test_rkd_keeps_its_precision_under_autocast(self, embeddings):
        s, t = (x.float() for x in embeddings)
        with torch.autocast('cpu', torch.bfloat16):
            close(rkd_loss(s, t), rkd_loss(*embeddings).item(), rtol=1e-5)

    def test_one_hot_targets_are_indices(self, logits, target, embeddings):
        one_hot = F.one_hot(target, CLASSES).double()
        close(dkd_loss(*logits, one_hot), dkd_loss(*logits, target))
        close(nkd_loss(*logits, one_hot), nkd_loss(*logits, target))
        close(rld_loss(*logits, one_hot), rld_loss(*logits, target))
        close(ofa_loss(*logits, one_hot), ofa_loss(*logits, target))
        centers = wave(CLASSES, 8, pitch=2.3)
        close(nd_loss(*embeddings, centers, one_hot), nd_loss(*embeddings, centers, target))

    def test_mixed_targets_count_for_their_most_probable_class(self, logits, target):
        mixed = 0.6 * F.one_hot(target, CLASSES) + 0.4 * F.one_hot(target.flip(0), CLASSES)
        close(dkd_loss(*logits, mixed), dkd_loss(*logits, target))
        close(ofa_loss(*logits, mixed), ofa_loss(*logits, target))

    def test_nd_of_a_class_without_centre(self, embeddings, target):
        close(nd_loss(*embeddings, torch.zeros(CLASSES, 8, dtype=torch.float64), target), 1.0)


class TestErrors:
    @pytest.mark.parametrize('bad', [torch.zeros(5).long(), torch.zeros(6), torch.zeros(6, 9), torch.zeros(6, 10, 1)])
    def test_targets(self, logits, embeddings, bad):
        for loss in (
            lambda: dkd_loss(*logits, bad),
            lambda: nkd_loss(*logits, bad),
            lambda: rld_loss(*logits, bad),
            lambda: ofa_loss(*logits, bad),
            lambda: nd_loss(*embeddings, torch.zeros(CLASSES, 8).double(), bad),
        ):
            with pytest.raises(ValueError, match=r'target must hold class indices, shape \(6,\)'):
                loss()

    def test_shapes(self, embeddings, maps):
        with pytest.raises(ValueError, match='8 .student., 7 .teacher'):
            nd_loss(embeddings[0], embeddings[1][:, :7], torch.zeros(CLASSES, 8), torch.zeros(6).long())
        with pytest.raises(ValueError, match='3 of the student and 2 of the teacher'):
            hcl_loss(maps[0], maps[1][:2])
        with pytest.raises(ValueError, match='maps of one shape'):
            hcl_loss(maps[0][:1], maps[1][1:2])
        with pytest.raises(ValueError, match='at least 2'):
            rkd_loss(embeddings[0][:1], embeddings[1][:1])

    def test_check_finite_names_the_terms(self):
        fine = torch.tensor(1.0)
        check_finite({'task': fine, 'dkd': fine})
        with pytest.raises(FloatingPointError, match='^dkd is nan, nd is inf: '):
            check_finite({'task': fine, 'dkd': fine * float('nan'), 'nd': fine / 0})
