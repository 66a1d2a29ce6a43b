"""Students, ratios and branches by how well they suit a teacher."""

import math
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm import create_model
from tqdm import tqdm

from ..distillers.feature_tap import model_name
from ..errors import LIBRARY_ERRORS, InputError, NamedError, first_line, is_bug
from ..expansion.copies import plain_copy
from ..teacher import expand
from ..teacher.branches import branch_kinds
from .networks import Cost, measure_cost, random_networks
from .similarity import Fingerprint, compare_fingerprints, take_fingerprint

__all__ = ['Batch', 'RankedStudent', 'random_batches', 'rank_students']

# A timm name, or a model, which is copied.
Network = Union[str, nn.Module]
# Images, shape (B, in_chans, H, W), and class indices, shape (B,).
Batch = Tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RankedStudent:
    """How a student, or a dynamic teacher of one, suits a teacher.

    Attributes:
        name: its own, or the ratio and branches.
        score: minus the sum of the two distances; higher suits better.
        deviation: of the score over the initialisations of the student; None of a single one.
        relation: see :class:`timm_gpd.rank.Similarity`.
        semantic: the same.
        cost: parameters, multiply-accumulates and time.
    """

    name: str
    score: float
    deviation: Optional[float]
    relation: float
    semantic: float
    cost: Cost


class Candidate(NamedTuple):
    """A network that is made when its turn comes, and only then takes memory."""

    name: str
    create: Callable[[], nn.Module]


def rank_students(
    teacher: Optional[Network],
    students: Union[Sequence[Network], Mapping[str, Network]],
    batches: Optional[Sequence[Batch]] = None,
    ratios: Sequence[int] = (),
    branches: Sequence[int] = (),
    initializations: int = 3,
    seed: int = 0,
    num_classes: int = 1000,
) -> List[RankedStudent]:
    """Ranks students by DisWOT (arXiv 2303.15678): what has random weights alike is distilled well, so the paper.

    Teacher and students are given random weights, several times; the score is the mean over all pairs of
    initialisations and over batches of :attr:`timm_gpd.rank.Similarity.score`. No gradient is computed, and the models
    that are given stay as they are.

    With ``ratios`` or ``branches`` the candidates are the dynamic teachers of one student. As each starts as the
    student's function, which scores 0, they are compared with random weights too: it is wide models that are ranked, by
    how they resemble the static teacher or, without one, the student.

    Args:
        teacher: timm name or model; None for the student, where ``ratios`` or ``branches`` are ranked.
        students: timm names or models, or these by the names that they are to have.
        batches: of images and classes; by default one of 64 random images of 3 x 224 x 224 with random labels.
        ratios: expansion ratios of the one student; default 2 where there are ``branches``.
        branches: numbers of branches of the same; default 1 where there are ``ratios``.
        initializations: of teacher and of every student.
        seed: of their weights, and of random batches.
        num_classes: of models that are named; a model has its own.

    Returns:
        The students, the best first.

    Raises:
        InputError: if there are no students, one cannot be created, does not take the images, or has no feature maps,
            no embedding or other classes; or a number is out of range.
        UnsupportedModelError: if the one student cannot be widened.
    """
    candidates = _name_students(students, bool(ratios or branches))
    _check_numbers(initializations=[initializations], ratios=ratios, branches=branches, num_classes=[num_classes])
    if batches is None:
        batches = random_batches(1, 64, (3, 224, 224), num_classes, seed)
    elif not batches:
        raise InputError('the list of batches is empty: give one, or None for random images')
    options = dict(num_classes=num_classes, in_chans=batches[0][0].shape[1])
    size = tuple(batches[0][0].shape[-2:])
    found = [Candidate(name, _creator(network, options, size)) for name, network in candidates.items()]
    if teacher is not None:
        reference = Candidate(_name_of(teacher), _creator(teacher, options, size))
    elif ratios or branches:
        reference = found[0]
    else:
        raise InputError('no teacher is given: name one, or ratios and branches of a student to compare with itself')
    given = [reference, *found]
    if ratios or branches:
        found = _widen(found[0], ratios or (2,), branches or (1,))

    seeds = [seed * 1_000_003 + index for index in range(2 * initializations)]
    progress = tqdm(total=initializations * (1 + len(found)), unit='network', disable=None, leave=False)
    with progress, torch.random.fork_rng(devices=[]):
        for candidate in given:
            _check(candidate, batches[0])
        of_teacher, _ = _fingerprints(reference, batches, seeds[:initializations], progress)
        ranked = [
            _rank(candidate.name, of_teacher, *_fingerprints(candidate, batches, seeds[initializations:], progress))
            for candidate in found
        ]
    return sorted(ranked, key=lambda student: -student.score)


def random_batches(
    count: int, batch_size: int, input_size: Tuple[int, int, int], num_classes: int, seed: int
) -> List[Batch]:
    """Batches of images of independent normal pixels, and of independent labels: what to rank by without data.

    Args:
        count: how many batches.
        batch_size: images of each.
        input_size: channels, height and width in pixels.
        num_classes: of the labels.
        seed: of all of them.

    Returns:
        The batches.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch_size, *input_size, generator=generator),
            torch.randint(num_classes, (batch_size,), generator=generator),
        )
        for _ in range(count)
    ]


def _name_of(network: Network) -> str:
    return network if isinstance(network, str) else model_name(network)


def _name_students(students: Any, is_one: bool) -> Dict[str, Network]:
    if isinstance(students, (str, nn.Module)):
        raise InputError('students are a list of names or models: put the one into a list')
    pairs = list(students.items()) if isinstance(students, Mapping) else [(_name_of(one), one) for one in students]
    if not pairs:
        raise InputError('the list of students is empty: give at least one')
    if is_one and len(pairs) > 1:
        raise InputError(f'ratios and branches are ranked for one student, but there are {len(pairs)}: give one')
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise InputError(f'{twice} is among the students twice: give it once, or models by different names')
    return named


def _check_numbers(**numbers: Sequence[Any]) -> None:
    for name, values in numbers.items():
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f'{name} must be integers of at least 1, but there is {value!r}')


def _creator(network: Network, options: Dict[str, Any], size: Tuple[int, ...]) -> Callable[[], nn.Module]:
    """What makes a network: a model of that name for images of that size, or a copy of the one that is given."""
    if isinstance(network, nn.Module):
        return lambda: plain_copy(network)
    if not isinstance(network, str):
        raise InputError(f'a network is a name or a model, but not {network!r}')

    def create() -> nn.Module:
        try:
            try:
                return create_model(network, img_size=size, **options)
            except TypeError as error:  # of architectures that take images of any size
                if 'img_size' not in str(error):
                    raise
            return create_model(network, **options)
        except LIBRARY_ERRORS as error:
            raise InputError(f'{network} cannot be created: {first_line(error)}') from error

    return create


def _widen(student: Candidate, ratios: Sequence[int], branches: Sequence[int]) -> List[Candidate]:
    for number in branches:
        branch_kinds(number)  # says what is wrong with it

    def creator(ratio: int, number: int) -> Callable[[], nn.Module]:
        # stored as they are run: weights that are drawn have the wide model's deviation
        return lambda: expand(student.create(), ratio, number, noise=0.0, scale='teacher')

    return [
        Candidate(f'{student.name}, ratio {ratio}, {number} branch{"es" if number > 1 else ""}', creator(ratio, number))
        for ratio in ratios
        for number in branches
    ]


def _check(candidate: Candidate, batch: Batch) -> None:
    """Refuses a network that cannot be scored, before any is."""
    images, target = batch
    model = candidate.create().to(images.device)
    if not getattr(model, 'num_classes', 1):
        raise InputError(f'{candidate.name} has no classifier: give another')
    if target.max() >= getattr(model, 'num_classes', math.inf):
        raise InputError(
            f'{candidate.name} has {model.num_classes} classes and a label is {int(target.max())}: set num_classes'
        )
    try:
        take_fingerprint(next(random_networks(model, [0])), images[:2], target[:2])
    except LIBRARY_ERRORS as error:
        if isinstance(error, NamedError) or is_bug(error):
            raise
        height, width = images.shape[-2:]
        raise InputError(
            f'{candidate.name} takes no images of {images.shape[1]} x {height} x {width} ({first_line(error)}): choose '
            'another size, or leave it out'
        ) from error


def _fingerprints(
    candidate: Candidate, batches: Sequence[Batch], seeds: Sequence[int], progress: Any
) -> Tuple[List[List[Fingerprint]], Cost]:
    """Of every initialisation what it makes of every batch; and the cost of the last."""
    torch.manual_seed(seeds[0])  # of what is not drawn for each initialisation: tables and tokens
    model, found = candidate.create().to(batches[0][0].device), []
    for network in random_networks(model, seeds):
        found.append([take_fingerprint(network, *batch) for batch in batches])
        progress.update()
    return found, measure_cost(model, network, batches[0][0])


def _rank(
    name: str, of_teacher: List[List[Fingerprint]], of_student: List[List[Fingerprint]], cost: Cost
) -> RankedStudent:
    """Means over all pairs of a teacher's and a student's initialisation; the deviation is over the student's."""
    rows = [
        [compare_fingerprints(*pair) for teacher in of_teacher for pair in zip(teacher, student)]
        for student in of_student
    ]
    scores = [statistics.fmean(similarity.score for similarity in row) for row in rows]
    relation, semantic = (
        statistics.fmean(getattr(similarity, part) for row in rows for similarity in row)
        for part in ('relation', 'semantic')
    )
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return RankedStudent(name, statistics.fmean(scores), deviation, relation, semantic, cost)
