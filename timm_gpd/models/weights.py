"""Where the weights of a variant come from: the authors' releases are converted on the way, all else is timm's task."""

import os
import zipfile
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, Dict, Iterator, Optional
from urllib.parse import urlparse

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch.hub import download_url_to_file, get_dir

from ..errors import InputError, WeightsError, first_line
from .releases import convert_state_dict, is_release, read_release

__all__ = ['resolve_weights', 'hub_errors']


def resolve_weights(cfg: PretrainedCfg, cache_dir: Optional[str] = None) -> Dict[str, Any]:
    """Fetches and, where they are an authors' release, converts the weights that a config points at.

    Args:
        cfg: config whose ``architecture`` is a plain one. Sources are preferred in timm's order.
        cache_dir: folder of downloads, default torch.hub's.

    Returns:
        Entries to replace in the config, so that timm's own loading finds plain weights: ``state_dict``, ``file`` or,
        for sources that timm reads itself, none.

    Raises:
        RuntimeError: if the file is missing or cannot be downloaded, is refused, or is of another architecture.
    """
    if cfg.source or cfg.state_dict or cfg.custom_load or (cfg.hf_hub_id and not cfg.file):
        return {}
    path = cfg.file or _download(str(cfg.url), cache_dir or os.path.join(get_dir(), 'checkpoints'))
    if not os.path.isfile(path):
        raise WeightsError(f'there are no weights at {path}')
    if path.endswith('.safetensors'):
        return {'file': path}
    try:
        checkpoint = read_release(path)
        if not is_release(checkpoint):
            return {'file': path}
        architecture, state_dict = convert_state_dict(checkpoint)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    if architecture != cfg.architecture:
        raise WeightsError(f'{path} holds a {architecture}, not a {cfg.architecture}: create a {architecture}_gpd')
    return {'state_dict': state_dict}


@contextmanager
def hub_errors(hub_id: Optional[str]) -> Iterator[None]:
    """Turns what goes wrong between timm and the Hub into one line that says how to do without it.

    Args:
        hub_id: from which weights are loaded; None where they are not the Hub's.

    Yields:
        Nothing: it is for a ``with`` statement.

    Raises:
        WeightsError: if they cannot be loaded.
    """
    try:
        yield
    except OSError as error:
        if not hub_id:
            raise
        from huggingface_hub.constants import HF_HUB_CACHE

        raise WeightsError(
            f'the weights at hf-hub:{hub_id} cannot be loaded ({first_line(error)}): once downloaded they are read '
            f'from {HF_HUB_CACHE} (HF_HOME moves it, HF_HUB_OFFLINE=1 asks no network), or name a local file with '
            "pretrained_cfg_overlay=dict(file='...')"
        ) from error


def _download(url: str, cache_dir: str) -> str:
    """The cached file of a URL. A download is checked before it enters the cache."""
    cached = os.path.join(cache_dir, os.path.basename(urlparse(url).path))
    if os.path.exists(cached):
        return cached
    os.makedirs(cache_dir, exist_ok=True)
    partial = f'{cached}.{os.getpid()}.partial'
    try:
        download_url_to_file(url, partial, progress=False)
        _check_whole(partial, cached)
        os.replace(partial, cached)
    except (OSError, HTTPException) as error:
        raise WeightsError(
            f'{url} cannot be downloaded ({first_line(error)}): without network, put the file at {cached} '
            "(TORCH_HOME moves this cache), or name it with pretrained_cfg_overlay=dict(file='...')"
        ) from error
    except (ValueError, SafetensorError) as error:
        reason = first_line(error).replace(partial, 'it')
        raise WeightsError(f'the download of {url} is refused and not kept: {reason}') from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return cached


def _check_whole(path: str, name: str) -> None:
    """Raises a ValueError or SafetensorError if a file is truncated or corrupted, or holds more than weights."""
    if name.endswith('.safetensors'):
        with safe_open(path, 'pt'):
            return
    read_release(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself skips the checksums
        if damaged:
            raise InputError(f'{path} is corrupted')
