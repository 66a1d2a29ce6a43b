"""``<arch>_gpd`` in timm's registry, and the weights that they load."""

import dataclasses
import io
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

from authors_format import SMALL, checkpoint
from timm_gpd import DynamicTeacher
from timm_gpd.expansion.verify import relative_error
from timm_gpd.models.releases import RELEASES, convert_state_dict
from timm_gpd.models.variants import plain_name


def test_every_architecture_has_a_variant():
    plain = {name for name in timm.list_models() if not name.endswith('_gpd')}
    assert {name + '_gpd' for name in plain} == set(timm.list_models('*_gpd'))


def test_a_variant_is_the_plain_student():
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', num_classes=10, in_chans=1)
    torch.manual_seed(0)
    variant = timm.create_model('resnet18_gpd', num_classes=10, in_chans=1)
    assert type(variant) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), variant.state_dict().values()))
    assert variant.pretrained_cfg['architecture'] == 'resnet18'
    variant.reset_classifier(3)
    assert variant.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_features_only():
    features = timm.create_model('resnet18_gpd', features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [64, 128]


def test_with_a_ratio_a_variant_is_the_dynamic_teacher():
    teacher = timm.create_model('test_resnet_gpd', gpd_ratio=3, gpd_branches=1, num_classes=7)
    assert isinstance(teacher, DynamicTeacher) and teacher.plan.ratio == 3
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_weights_come_from_a_file(tmp_path):
    plain = timm.create_model('test_resnet')
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    variant = timm.create_model(
        'test_resnet_gpd', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'))
    )
    assert torch.equal(variant.fc.weight, plain.fc.weight)


def test_no_published_weights_is_one_line():
    with pytest.raises(RuntimeError, match='resnet26_gpd has no published weights') as error:
        timm.create_model('resnet26_gpd', pretrained=True)
    for word in ('resnet18_gpd', 'mobilenetv1_100_gpd', 'rvt_tiny_gpd', 'file=', 'hf_hub_id='):
        assert word in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name, plain',
    [
        ('resnet18_gpd', 'resnet18'),
        ('resnet18_gpd.tag_gpd', 'resnet18.tag_gpd'),
        ('resnet18', 'resnet18'),
        ('local-dir:runs/student_gpd', 'local-dir:runs/student_gpd'),
        ('hf-hub:me/net_gpd', 'hf-hub:me/net_gpd'),
    ],
)
def test_plain_name(name, plain):
    assert plain_name(name) == plain


def test_the_published_weights_are_the_authors():
    assert timm.list_pretrained('*_gpd') == [
        'mobilenetv1_100_gpd.dkd_in1k',
        'resnet18_gpd.dkd_in1k',
        'rvt_tiny_gpd.dkd_in1k',
    ]
    for name, interpolation in (('resnet18', 'bilinear'), ('mobilenetv1_100', 'bilinear'), ('rvt_tiny', 'bicubic')):
        model = timm.create_model(name + '_gpd.dkd_in1k')
        data = timm.data.resolve_data_config(model=model)
        assert data['mean'] == (0.485, 0.456, 0.406) and data['std'] == (0.229, 0.224, 0.225)
        assert (data['input_size'], data['crop_pct'], data['interpolation']) == ((3, 224, 224), 0.875, interpolation)
        assert model.pretrained_cfg['architecture'] == name and model.pretrained_cfg['tag'] == 'dkd_in1k'
        assert model.pretrained_cfg['url'].startswith('https://github.com/guoyongcs/GPD/releases/download/v0.1/')
        assert 'hf_hub_id' not in model.pretrained_cfg and 'license' not in model.pretrained_cfg


def activations(model):
    return {type(module) for module in model.modules() if 'relu' in type(module).__name__.lower()}


def test_the_authors_mobilenet_has_relu_and_a_new_one_is_plain(tmp_path):
    assert activations(timm.create_model('mobilenetv1_100_gpd')) == {torch.nn.ReLU6}
    torch.save(checkpoint(SMALL['mobilenetv1_100'][0]()), tmp_path / 'release.pth.tar')
    released = timm.create_model(
        'mobilenetv1_100_gpd',
        pretrained=True,
        num_classes=5,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'release.pth.tar'), num_classes=5),
    )
    assert activations(released) == {torch.nn.ReLU}


@pytest.mark.parametrize('arch', ['resnet26', 'resnet18'])
def test_weights_from_an_unknown_url_are_not_the_plain_ones(arch, tmp_path):
    """A variant must never load the plain architecture's weights in place of what it was pointed at."""
    with pytest.raises(RuntimeError, match='127.0.0.1:9/gone.pth cannot be downloaded') as error:
        timm.create_model(
            arch + '_gpd',
            pretrained=True,
            pretrained_cfg_overlay=dict(url='http://127.0.0.1:9/gone.pth'),
            cache_dir=str(tmp_path),
        )
    assert str(tmp_path / 'gone.pth') in str(error.value) and 'file=' in str(error.value)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


class Site:
    """A web site on this machine. Pages: path -> (status, body, length that is declared)."""

    def __init__(self):
        self.pages, self.requests = {}, []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append(self.path)
                status, body, length = site.pages.get(self.path, (404, b'', 0))
                self.send_response(status)
                self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def small_release(monkeypatch):
    """A checkpoint in the authors' format of a narrow resnet18, as bytes, and its plain state dict."""
    make_teacher, _, model_args = SMALL['resnet18']
    monkeypatch.setitem(RELEASES, 'resnet18', dataclasses.replace(RELEASES['resnet18'], model_args=model_args))
    saved, file = checkpoint(make_teacher()), io.BytesIO()
    torch.save(saved, file)
    return file.getvalue(), convert_state_dict(saved)[1]


def load_small(cache, **kwargs):
    overlay = dict(num_classes=5, **kwargs.pop('overlay'))
    return timm.create_model(
        'resnet18_gpd', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(cache), **kwargs
    )


def test_a_release_is_downloaded_once_and_converted(site, small_release, tmp_path):
    body, state_dict = small_release
    site.pages['/r.pth.tar'] = 200, body, len(body)
    for _ in range(2):
        student = load_small(tmp_path, overlay=dict(url=site.url + '/r.pth.tar'))
        assert all(
            torch.equal(student.state_dict()[name], tensor.to(student.state_dict()[name].dtype))
            for name, tensor in state_dict.items()
        )
    assert site.requests == ['/r.pth.tar'] and os.listdir(tmp_path) == ['r.pth.tar']
    assert student.pretrained_cfg['url'] == site.url + '/r.pth.tar'
    assert not {'file', 'state_dict'} & student.pretrained_cfg.keys()


def test_a_release_is_adapted_as_timm_does(small_release, tmp_path):
    body, state_dict = small_release
    path = tmp_path / 'release.pth.tar'
    path.write_bytes(body)
    overlay = dict(file=str(path))
    gray = load_small(tmp_path, overlay=overlay, in_chans=1, num_classes=3)
    assert gray.fc.weight.shape[0] == 3
    assert relative_error(gray.conv1.weight, state_dict['conv1.weight'].sum(1, keepdim=True).float()) < 1e-6
    features = load_small(tmp_path, overlay=overlay, features_only=True)
    assert torch.equal(features.layer1[0].conv1.weight, state_dict['layer1.0.conv1.weight'].float())
    assert 'state_dict' not in features.pretrained_cfg
    teacher = load_small(tmp_path, overlay=overlay, gpd_ratio=2)
    assert torch.equal(teacher.extract_student().fc.bias, state_dict['fc.bias'].float())


def damaged(kind, body):
    if kind == 'truncated':
        return body[: len(body) // 2]
    if kind == 'corrupted':  # one bit of a tensor, which torch.load does not notice
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    return b'<html>log in first</html>'


@pytest.mark.parametrize('kind', ['truncated', 'corrupted', 'page'])
@pytest.mark.parametrize('honest', [True, False])
def test_a_damaged_download_is_refused_and_not_kept(kind, honest, site, small_release, tmp_path):
    body, _ = small_release
    sent = damaged(kind, body)
    site.pages['/r.pth.tar'] = 200, sent, len(sent) if honest else len(body)
    with pytest.raises(RuntimeError, match='/r.pth.tar') as error:
        load_small(tmp_path, overlay=dict(url=site.url + '/r.pth.tar'))
    assert '\n' not in str(error.value) and not os.listdir(tmp_path)
    site.pages['/r.pth.tar'] = 200, body, len(body)
    load_small(tmp_path, overlay=dict(url=site.url + '/r.pth.tar'))


def test_a_page_that_is_not_there_is_one_line(site, tmp_path):
    with pytest.raises(RuntimeError, match=r'cannot be downloaded \(HTTP Error 404') as error:
        load_small(tmp_path, overlay=dict(url=site.url + '/none.pth.tar'))
    assert '\n' not in str(error.value) and not os.listdir(tmp_path)


def test_plain_weights_come_from_a_url_too(site, tmp_path):
    plain, file = timm.create_model('test_resnet'), io.BytesIO()
    torch.save({'state_dict': plain.state_dict()}, file)
    site.pages['/plain.pth'] = 200, file.getvalue(), len(file.getvalue())
    variant = timm.create_model(
        'test_resnet_gpd',
        pretrained=True,
        cache_dir=str(tmp_path),
        pretrained_cfg_overlay=dict(url=site.url + '/plain.pth'),
    )
    assert torch.equal(variant.fc.weight, plain.fc.weight)


def test_a_release_of_another_architecture_is_one_line(small_release, tmp_path):
    path = tmp_path / 'release.pth.tar'
    path.write_bytes(small_release[0])
    with pytest.raises(RuntimeError, match='holds a resnet18, not a rvt_tiny: create a resnet18_gpd'):
        timm.create_model('rvt_tiny_gpd', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('name', ['none.pth', 'none.safetensors'])
def test_a_missing_file_is_one_line(name, tmp_path):
    with pytest.raises(RuntimeError, match=f'there are no weights at .*{name}'):
        timm.create_model('resnet18_gpd', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / name)))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='hf-hub:me/none cannot be loaded') as error:
        timm.create_model('test_resnet_gpd', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='me/none'))
    for word in ('HF_HOME', 'HF_HUB_OFFLINE=1', 'file='):
        assert word in str(error.value)
    assert '\n' not in str(error.value)


def test_importing_stays_cheap_in_what_it_imports():
    """No model is built, and nothing heavy is loaded that timm does not load."""
    code = (
        'import sys, timm; before = set(sys.modules); import timm_gpd; '
        'print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))'
    )
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {'matplotlib', 'sklearn', 'pandas', 'scipy', 'tqdm'}, loaded
