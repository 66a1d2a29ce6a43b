"""What autograd and torch.func do with the dynamic teacher beyond a first backward pass: right, or refused."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.func import functional_call, grad, hessian, jvp, vmap

from timm_gpd import GapPreservingTask, expand
from timm_gpd.axes import AxisMap, TensorMap
from timm_gpd.teacher.branches import BRANCH_KINDS, BranchedKernel, cosine_prior
from timm_gpd.teacher.merge import merge_branches, merge_plainly


class TanhNet(nn.Module):
    """Smooth, so that finite differences tell second derivatives."""

    in_chans = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.fc = nn.Linear(2, 3)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


@pytest.fixture(params=[1, 6], ids=['plain', 'branches'])
def teacher(request):
    teacher = expand(TanhNet(), num_branches=request.param, noise=0.1).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in teacher.branches.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return teacher


IMAGES = torch.linspace(-1, 1, 3 * 25, dtype=torch.float64).view(3, 1, 5, 5).sin()


def joint_loss(teacher, x=IMAGES):
    student_logits, teacher_logits = teacher.joint(x)
    return student_logits.square().sum() + teacher_logits.cos().sum()


def loss_of(teacher, names, parameters):
    """The loss as a function of parameters, for torch.func."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self):
            return joint_loss(self.teacher)

    return functional_call(Loss(), {f'teacher.{name}': p for name, p in zip(names, parameters)}, ())


def test_second_derivatives_are_those_of_finite_differences(teacher):
    parameters = list(teacher.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    first = torch.autograd.grad(joint_loss(teacher), parameters, create_graph=True)
    product = sum((gradient * direction).sum() for gradient, direction in zip(first, directions))
    actual = torch.autograd.grad(product, parameters)

    def gradients(step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=step)
        found = torch.autograd.grad(joint_loss(teacher), parameters)
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.sub_(direction, alpha=step)
        return found

    for above, below, second in zip(gradients(1e-5), gradients(-1e-5), actual):
        torch.testing.assert_close(second, (above - below) / 2e-5, rtol=1e-5, atol=1e-7)


def test_transforms_of_torch_func_are_right(teacher):
    names = [name for name, _ in teacher.named_parameters()]
    parameters = tuple(parameter.detach().clone() for parameter in teacher.parameters())
    expected = torch.autograd.grad(joint_loss(teacher), list(teacher.parameters()))
    actual = grad(lambda parameters: loss_of(teacher, names, parameters))(parameters)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    tangents = tuple(torch.randn_like(parameter) for parameter in parameters)
    along = sum((gradient * tangent).sum() for gradient, tangent in zip(expected, tangents))
    _, derivative = jvp(lambda *parameters: loss_of(teacher, names, parameters), parameters, tangents)
    torch.testing.assert_close(derivative, along, rtol=1e-10, atol=1e-12)


def test_per_example_gradients_and_hessians_of_images(teacher):
    def loss(image):
        return joint_loss(teacher, image[None])

    x = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(image) for image in x), x)
    torch.testing.assert_close(vmap(grad(loss))(IMAGES), expected, rtol=1e-10, atol=1e-12)
    matrix = hessian(loss)(IMAGES[0]).view(25, 25)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-8, atol=1e-12)
    assert matrix.abs().max() > 1e-4


def test_forward_mode(teacher):
    tangent = torch.randn_like(IMAGES)
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(joint_loss(teacher, forward_ad.make_dual(IMAGES, tangent))).tangent
    x = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(joint_loss(teacher, x), x)
    torch.testing.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-10, atol=1e-12)


def test_a_tasks_loss_in_transforms_and_forward_mode(teacher):
    """There the teacher's backward pass does not run early: a detached loss would lose its part of the derivative."""
    task = GapPreservingTask(TanhNet(), noise=0.1, verbose=False).double()
    target, tangent = torch.arange(3), torch.randn_like(IMAGES)

    def loss(x):
        return task(x, target)['loss']

    x = IMAGES.clone().requires_grad_()
    loss(x).backward()
    torch.testing.assert_close(grad(loss)(IMAGES), x.grad, rtol=1e-10, atol=1e-12)
    along = (x.grad * tangent).sum()
    torch.testing.assert_close(jvp(loss, (IMAGES,), (tangent,))[1], along, rtol=1e-10, atol=1e-12)
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(loss(forward_ad.make_dual(IMAGES, tangent))).tangent
    torch.testing.assert_close(derivative, along, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(
    'tensor_map',
    [
        None,
        TensorMap((6, 2, 3, 3), ((0, AxisMap.uniform(6, 2)), (1, AxisMap.uniform(2, 2))), sum_axis=1),
    ],
    ids=['unshared', 'shared'],
)
def test_the_fast_merge_is_the_plain_one(groups, tensor_map, monkeypatch):
    """Kernels of both models and all gradients, of a merge that is put together by each."""
    kernel = torch.randn(12, 4, 3, 3, dtype=torch.float64)
    branched = BranchedKernel(kernel, groups, BRANCH_KINDS, cosine_prior(12, 3))
    for parameter in branched.parameters():
        nn.init.normal_(parameter)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((12, 4, 3, 3), (6, 2, 3, 3))]
    results = []
    for merge in (
        merge_branches,
        lambda *inputs: (merge_plainly(*inputs),) * 2 if tensor_map is None else merge_plainly(*inputs),
    ):
        monkeypatch.setattr('timm_gpd.teacher.branches.merge_branches', merge)
        kernels = branched(0.5, tensor_map)
        used = zip(kernels, weights if tensor_map is not None else weights[:1])
        loss = sum((kernel * weight).sum() for kernel, weight in used)
        results.append([*kernels, *torch.autograd.grad(loss, list(branched.parameters()))])
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_two_threads_run_one_model_each_on_its_own_tensors(teacher):
    """The first is held inside its forward pass while the second, on other parameters, runs and ends."""
    expected = teacher(IMAGES).detach()
    inside, leave, outputs = threading.Event(), threading.Event(), {}

    def wait(module, inputs):
        if threading.current_thread().name == 'first':
            inside.set()
            assert leave.wait(30)

    hook = teacher.wide.fc.register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: outputs.update(first=teacher(IMAGES).detach()), name='first')
    first.start()
    assert inside.wait(30)
    outputs['second'] = teacher.forward_student(IMAGES).detach() + 0 * teacher(2 * IMAGES).detach()
    leave.set()
    first.join(30)
    hook.remove()
    assert torch.equal(outputs['first'], expected)
    assert torch.equal(outputs['second'], teacher.forward_student(IMAGES))


def test_replicas_of_data_parallel_are_refused(teacher):
    replica = teacher._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match='nn.DataParallel.*DistributedDataParallel'):
        replica(IMAGES)


def test_shards_are_refused(teacher, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        weight = teacher.wide.fc.weight
        teacher.wide.fc.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(RuntimeError, match='fc.weight is a DTensor.*DistributedDataParallel'):
            teacher.joint(IMAGES)
    finally:
        torch.distributed.destroy_process_group()
