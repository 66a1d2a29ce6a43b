"""Random networks have exact dynamic teachers, or are refused."""

import pytest

from random_networks import BLOCKS, FAILURES, culprit, describe, judge, report, show, without

# Kinds of block that are refused, in all of their variants or in some; docs/rules.md says why.
REFUSED = {
    'attention without a rule',
    'bilinear',
    'low rank',
    'shift of channels',
    'tied embedding',
    'token broadcast by stored width',
    'weight norm by hand',
}
NETWORKS, CHUNK = 300, 50


@pytest.mark.parametrize('first', range(0, NETWORKS, CHUNK))
def test_random_networks_are_exact_or_refused(first):
    verdicts = {seed: judge(describe(seed)) for seed in range(first, first + CHUNK)}
    failed = {seed: verdict for seed, verdict in verdicts.items() if verdict.outcome in FAILURES}
    assert not failed, f'{failed}: python tests/random_networks.py --seed {next(iter(failed))}'
    assert sum(verdict.outcome == 'exact' for verdict in verdicts.values()) >= 0.7 * CHUNK


@pytest.mark.parametrize('seed', (3866, 9557, 15122, 18104))
def test_a_wrong_plan_is_not_hidden_by_one_image(seed):
    """These have a block that is refused, and later layers that saturate on some images."""
    assert judge(describe(seed)).outcome == 'refused by the numeric check'


@pytest.mark.parametrize('seed', (3042, 14743))
def test_gradients_that_are_not_finite_are_compared(seed):
    """Those of these students are NaN, alone and inside."""
    assert judge(describe(seed)).outcome == 'exact'


@pytest.mark.parametrize('kind', BLOCKS)
def test_block_is_exact(kind):
    """Each kind by itself: what is refused is refused for a reason that is known."""
    rank, _ = BLOCKS[kind]
    for seed in range(3):
        stacks = {'maps': [], 'tokens': [], 'maps' if rank == 'map' else 'tokens': [(kind, seed)]}
        network = {**describe(seed), 'reduce': 'mean', 'width': 8, **stacks}
        verdict = judge(network)
        assert verdict.outcome not in FAILURES, (show(network), verdict)
        assert verdict.outcome == 'exact' or kind in REFUSED, (show(network), verdict)


def test_a_network_is_drawn_by_its_seed_and_shrinks():
    network = next(describe(seed) for seed in range(100) if len(describe(seed)['maps']) == 3)
    assert describe(network['seed']) == network
    kinds = [kind for kind, _ in network['maps']]
    assert [kind for kind, _ in without(network, [1])['maps']] == [kinds[0], kinds[2]]
    assert all(kind in show(network) for kind in kinds)


def test_the_report_counts_refusals_by_the_block_to_blame():
    network = {**describe(0), 'reduce': 'mean', 'maps': [('conv', 0), ('shift of channels', 1)], 'tokens': []}
    verdict = judge(network)
    assert verdict.outcome == 'refused by the numeric check'
    assert culprit(network, verdict) == 'shift of channels'
    page = report([(7, verdict, 'shift of channels')], 'command', 60.0)
    assert '| numeric check | shift of channels | 1 | 7 |' in page
