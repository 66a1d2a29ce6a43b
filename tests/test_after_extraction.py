"""What people do with an extracted student: fuse, export, script, trace. It is the same function throughout."""

import io
import warnings

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from timm_gpd import DynamicTeacher, expand, plan_expansion
from timm_gpd.expansion.verify import randomize_

NAMES = {'test_resnet': 64, 'test_efficientnet': 64, 'test_vit': 32, 'test_convnext': 64}


@pytest.fixture(scope='module', params=NAMES)
def extracted(request):
    """A student that comes out of a dynamic teacher with branches, noise and moved statistics, and images."""
    torch.manual_seed(0)
    name, size = request.param, NAMES[request.param]
    settings = dict(img_size=size) if name == 'test_vit' else {}
    dynamic_teacher = randomize_(expand(timm.create_model(name, num_classes=5, **settings), num_branches=2, noise=0.1))
    student, x = dynamic_teacher.extract_student().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        return student, x, student(x)


def assert_same(output, expected):
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize('how', ['trace', 'script', 'export'])
def test_student_compiles_to_a_file(extracted, how):
    student, x, expected = extracted
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if how == 'export':
            torch.export.save(torch.export.export(student, (x,)), file)
            loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
        else:
            torch.jit.save(torch.jit.trace(student, x) if how == 'trace' else torch.jit.script(student), file)
            loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    assert_same(loaded(x), expected)


@torch.no_grad()
@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_student_runs_in_onnxruntime(extracted, dynamo, tmp_path):
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    if dynamo:
        pytest.importorskip('onnxscript')
    student, x, expected = extracted
    if dynamo and type(student).__name__ not in ('ResNet', 'VisionTransformer'):
        pytest.skip('slow: one of convolutions and one of attention do')
    path = str(tmp_path / 'student.onnx')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(student, (x,), path, dynamo=dynamo, input_names=['images'], verbose=False)
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(output), expected)


@torch.no_grad()
@pytest.mark.parametrize('name', ['mobileone_s1', 'fastvit_t8', 'levit_128s'])
def test_both_extracted_models_fuse(name):
    """Sizes that a module keeps as numbers, for the layer it is fused into, are the teacher's in the teacher."""
    student = timm.create_model(name, num_classes=5, **(dict(img_size=64) if name == 'levit_128s' else {}))
    dynamic_teacher = randomize_(DynamicTeacher(student, plan_expansion(student), noise=0.1)).eval()
    x = torch.randn(1, 3, 64, 64)
    for model in (dynamic_teacher.extract_student(), dynamic_teacher.extract_teacher()):
        expected = model(x)
        fused = reparameterize_model(model)
        assert len(list(fused.parameters())) < len(list(model.parameters()))
        assert_same(fused(x), expected)


@torch.no_grad()
def test_the_teacher_as_a_plain_model_takes_a_new_classifier():
    """Widths that it records are its own: what timm's classes build on them fits."""
    for name, size in NAMES.items():
        teacher = expand(timm.create_model(name, num_classes=5)).extract_teacher().eval()
        teacher.reset_classifier(3)
        size = 160 if name == 'test_vit' else size
        assert teacher(torch.randn(1, 3, size, size)).shape == (1, 3)
