"""A static teacher whose outputs are stored: what it has seen once, in this run or another, it need not see again.

A row of the store is what the teacher made of one image, under a key of the image itself: of its numbers as they reach
the teacher, and so of image and augmentation, whatever made them. A key that was of the number of an image in its data
set would be right only as long as the files, the transforms and their random numbers were known to be the same.
"""

import hashlib
import json
import os
from typing import Any, Dict, List, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import unwrap_model

from ..distillers import ModelOutput
from ..distillers.feature_tap import model_name
from ..errors import InputError
from .output_store import KEY_BYTES, OutputStore
from .static_teacher import StaticTeacher, StaticTeachers

__all__ = ['AnyStaticTeacher', 'StoredTeacher', 'stored_teachers']


class StoredTeacher(nn.Module):
    """A static teacher that computes only images which its store lacks.

    A batch that is all in the store is read from it, bit for bit as it was computed. Of any other the teacher computes
    the whole, and what was missing is stored. Another teacher, or the same one run in another way, has a store of its
    own in the same folder: weights, architecture, dtype, image size, normalisation, classes and what losses need of it
    make its name. What an image is computed under, device type and mixed precision, is part of the key.

    While nothing is missing, the teacher stays in the CPU's memory.

    Args:
        static: the teacher.
        folder: of the stores.

    Attributes:
        prefix: of the names of its metrics, as of any static teacher.
        online_modules: none, as it does not adapt.
        read: how many images were read.
        computed: how many the teacher has computed.
        bytes_per_image: what the store takes for one image, 0 before the first.

    Raises:
        InputError: if the folder cannot be used, or the teacher is to adapt.
    """

    prefix = StaticTeacher.prefix
    online_modules: None = None
    adapts = False

    def __init__(self, static: StaticTeacher, folder: str) -> None:
        super().__init__()
        if static.with_online_modules:
            raise InputError('online modules change what a teacher says: leave out its cache, or them')
        self.static, self.img_size = static, static.img_size
        description, digest = _describe(static)
        self.store = OutputStore(os.path.join(folder, digest), description)
        self.read = self.computed = self.bytes_per_image = 0
        self.device = next((parameter.device for parameter in static.teacher.model.parameters()), torch.device('cpu'))
        self.is_parked = len(self.store) > 0
        if self.is_parked:
            static.teacher.cpu()
        self._weights: Dict[Tuple[int, torch.device], torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, x: torch.Tensor, in_views: bool = False) -> ModelOutput:
        """Output for images of shape (B, in_chans, H, W), normalised for the student; views of such do not go."""
        keys = self._keys(x)
        kind, rows, found = self.store.read(keys)
        if found.all():
            self.read += len(x)
            self.bytes_per_image = rows.shape[1] + KEY_BYTES
            return _unpack(kind, torch.from_numpy(rows).to(x.device))
        self._wake()
        output = self.static(x)
        self.computed += len(x)
        kind, packed = _pack(output)
        rows = packed.cpu().numpy()
        self.bytes_per_image = rows.shape[1] + KEY_BYTES
        self.store.add(keys[~found], kind, rows[~found])
        return output

    def verify(self, x: torch.Tensor) -> None:
        """Checks the teacher, see :meth:`StaticTeacher.verify`, unless its output for the images is stored."""
        if not self.store.read(self._keys(x)).found.all():
            self._wake()
            self.static.verify(x)

    @property
    def members(self) -> List['StoredTeacher']:
        """The teachers that this is: itself."""
        return [self]

    def add_online_modules(self, x: torch.Tensor) -> None:
        """Adds none, see :meth:`StaticTeacher.add_online_modules`."""

    def train(self, mode: bool = True) -> 'StoredTeacher':
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the teacher; looking up is nothing that a compiler could follow.

        Args:
            *args: those of ``nn.Module.compile``.
            **kwargs: the same.
        """
        self.static.compile(*args, **kwargs)

    def _wake(self) -> None:
        if self.is_parked:
            self.static.teacher.to(self.device)
            self.is_parked = False

    def _keys(self, x: torch.Tensor) -> np.ndarray:
        """Keys of images, shape (B, 2), uint64."""
        data = x.detach().contiguous().flatten(1).view(torch.uint8)
        if data.shape[1] % 8 or data.storage_offset() % 8:
            data = F.pad(data, (0, -data.shape[1] % 8)).clone()
        words = data.view(torch.int64)
        place = words.shape[1], x.device
        if place not in self._weights:
            numbers = np.random.RandomState(0).randint(-(2**63), 2**63 - 1, (2, place[0]), np.int64)
            self._weights[place] = torch.from_numpy(numbers).to(x.device)
        kind = x.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return _hash(words, self._weights[place]) ^ _salt(x.dtype, tuple(x.shape[1:]), kind, self.device.type, mixed)


AnyStaticTeacher = Union[StaticTeacher, StaticTeachers, StoredTeacher]


def stored_teachers(static: nn.Module) -> List[StoredTeacher]:
    """Those of one static teacher, or of several as one, that have a store."""
    return [module for module in static.modules() if isinstance(module, StoredTeacher)]


# -- keys -------------------------------------------------------------------------------------------------------------


def _hash(words: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """Two weighted sums modulo 2^64 of every row's words; on a GPU too, and exact in whatever order they are added.

    With weights drawn at random, rows that differ have equal sums by chance alone, where low bits differ. A product and
    a shift before take care of that: pixels often differ in the high bits of a word only.

    Args:
        words: shape (B, N), int64.
        weights: shape (2, N), int64.

    Returns:
        Shape (B, 2), uint64.
    """
    mixed = words * -7046029254386353131  # an odd number, 2^64 over the golden ratio
    mixed ^= mixed >> 32
    return torch.stack([(mixed * weight).sum(1) for weight in weights], 1).cpu().numpy().view(np.uint64)


def _salt(*what: Any) -> np.ndarray:
    """Two words that differ wherever something that is said does."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=16).digest(), np.uint64)


def _describe(static: StaticTeacher) -> Tuple[Dict[str, Any], str]:
    """What a teacher's outputs depend on besides the image, for people, and a digest of all of it."""
    model = unwrap_model(static.teacher.model)
    statistics = {
        f'{owner}_{key}': getattr(static, f'{owner}_{key}').flatten().tolist()
        for owner in ('student', 'teacher')
        for key in ('mean', 'std')
    }
    description = dict(
        model=model_name(model),
        img_size=static.img_size,
        needs=sorted(static.tap.needs),
        class_map=static.class_indices.tolist(),
        **statistics,
    )
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, module in model.named_modules():
        # Sizes, heads and the like, which neither weights nor names tell
        numbers = {key: value for key, value in vars(module).items() if key[0] != '_' and _is_plain(value)}
        numbers.pop('training')
        digest.update(
            repr((name, type(module).__module__, type(module).__qualname__, sorted(numbers.items()))).encode()
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    found = digest.hexdigest()[:32]
    return {**description, 'dtype': str(next(iter(model.parameters()), torch.empty(0)).dtype), 'digest': found}, found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


# -- rows -------------------------------------------------------------------------------------------------------------


def _pack(output: ModelOutput) -> Tuple[List[List[Any]], torch.Tensor]:
    """An output as rows of bytes, shape (B, bytes), and what they consist of."""
    fields = [('logits', output.logits), *(('stages', stage) for stage in output.stages)]
    if output.embedding is not None:
        fields.append(('embedding', output.embedding))
    kind, parts = [], []
    for name, tensor in fields:
        is_last = tensor.dim() == 4 and not tensor.is_contiguous()  # stages as channels last, which sums go by
        kind.append([name, str(tensor.dtype).removeprefix('torch.'), list(tensor.shape[1:]), is_last])
        parts.append(tensor.contiguous().flatten(1).view(torch.uint8))
    return kind, torch.cat(parts, 1)


def _unpack(kind: List[List[Any]], rows: torch.Tensor) -> ModelOutput:
    """The output of :func:`_pack`."""
    fields: Dict[str, List[torch.Tensor]] = {'logits': [], 'stages': [], 'embedding': []}
    start = 0
    for name, dtype_name, shape, is_last in kind:
        dtype = getattr(torch, dtype_name)
        end = start + int(np.prod(shape)) * dtype.itemsize
        tensor = rows[:, start:end].clone(memory_format=torch.contiguous_format).view(dtype).reshape(-1, *shape)
        fields[name].append(tensor.contiguous(memory_format=torch.channels_last) if is_last else tensor)
        start = end
    return ModelOutput(fields['logits'][0], tuple(fields['stages']), next(iter(fields['embedding']), None))
