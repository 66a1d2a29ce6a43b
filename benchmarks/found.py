"""What a search has found: the best learning rates and ways, by the mean over its seeds."""

import statistics
import sys
from typing import Dict, List, NamedTuple

from runs import Results
from ways import PLAIN, family

__all__ = ['FIRST_FRESH_SEED', 'Found', 'best_learning_rate', 'best_of_search', 'best_ways']

FIRST_FRESH_SEED = 100  # seeds below it are the search's


class Found(NamedTuple):
    """The best learning rate of a way, and the mean top-1 (%) there."""

    lr: float
    top1: float


def best_of_search(results: Results) -> Dict[str, Dict[int, Found]]:
    """The best learning rate of the search, by way and epochs."""
    values: Dict[str, Dict[int, Dict[float, List[float]]]] = {}
    for trial, record in results.records.items():
        if trial.seed < FIRST_FRESH_SEED:
            by_lr = values.setdefault(trial.way, {}).setdefault(trial.epochs, {})
            by_lr.setdefault(trial.lr, []).append(record['top1'])
    return {
        way: {
            epochs: max((Found(lr, statistics.mean(top1)) for lr, top1 in by_lr.items()), key=lambda found: found.top1)
            for epochs, by_lr in of_way.items()
        }
        for way, of_way in values.items()
    }


def best_learning_rate(results: Results, way: str, epochs: int) -> float:
    """The learning rate that the search found best for a way."""
    found = best_of_search(results).get(way, {}).get(epochs)
    if found is None:
        sys.exit(f'nothing is known about {way} for {epochs} epochs: search first, or name other --epochs')
    return found.lr


def best_ways(results: Results, epochs: int, count: int) -> List[str]:
    """The best ways besides plain training, of so many epochs in the search; of one family the best alone."""
    runs = {way: of_way[epochs] for way, of_way in best_of_search(results).items() if way != PLAIN and epochs in of_way}
    ranked = sorted(runs, key=lambda way: -runs[way].top1)
    return list({family(way): way for way in reversed(ranked)}.values())[::-1][:count]
