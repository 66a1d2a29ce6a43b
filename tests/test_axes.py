"""The tensor algebra: replication, slicing, and noise that changes nothing."""

import itertools
import random

import pytest
import torch

from timm_gpd.axes import AxisMap, Segment, TensorMap


@pytest.mark.parametrize('ratio, block', list(itertools.product((1, 2, 3, 4), (1, 2, 3, 6))))
def test_student_index_n_block_becomes_n_ratio_block(ratio, block):
    axis_map = AxisMap.uniform(12, ratio, block)
    entries = torch.arange(12)
    wide = axis_map.replicate(entries, 0)
    expected = torch.tensor([n * block + b for n in range(12 // block) for _ in range(ratio) for b in range(block)])
    assert torch.equal(wide, expected)
    assert torch.equal(axis_map.first_replica(wide, 0), entries)
    assert torch.equal(wide[axis_map.replica_index() == 0], entries)


def test_segments_widen_on_their_own():
    axis_map = AxisMap((Segment(4, 2, 2), Segment(3, 1), Segment(2, 3)))
    entries = torch.arange(9)
    wide = axis_map.replicate(entries, 0)
    assert wide.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 7, 7, 8, 8, 8]
    assert (axis_map.size, axis_map.teacher_size, axis_map.ratio) == (9, 17, 3)
    assert torch.equal(axis_map.first_replica(wide, 0), entries)


def test_a_block_must_divide_its_axis():
    with pytest.raises(ValueError, match='block of 5'):
        AxisMap.uniform(12, 2, 5)


def test_slicing_an_interleaved_weight_copies_nothing():
    weight_OI = torch.randn(8, 12)
    tensor_map = TensorMap((4, 6), ((0, AxisMap.uniform(4, 2)), (1, AxisMap.uniform(6, 2))), sum_axis=1)
    assert tensor_map.first_replica(weight_OI).data_ptr() == weight_OI.data_ptr()


@pytest.mark.parametrize('ratio, out_ratio', list(itertools.product((2, 3, 4), (1, 2, 3))))
def test_noise_keeps_function_and_student(ratio, out_ratio):
    tensor_map = TensorMap(
        (6, 8), ((0, AxisMap.uniform(6, out_ratio, 2)), (1, AxisMap.uniform(8, ratio, 4))), sum_axis=1
    )
    weight_OI = tensor_map.replicate(torch.randn(6, 8, dtype=torch.float64))
    noise_OI = tensor_map.noise_like(weight_OI, std=1.0)
    x_I = AxisMap.uniform(8, ratio, 4).replicate(torch.randn(8, dtype=torch.float64), 0)
    torch.testing.assert_close((weight_OI + noise_OI) @ x_I, weight_OI @ x_I, rtol=0, atol=1e-13)
    assert not tensor_map.first_replica(noise_OI).any()
    # With two input replicas and no output replicas there is no freedom left; otherwise replicas differ.
    assert bool(noise_OI.any()) == (ratio > 2 or out_ratio > 1)


def test_no_noise_where_nothing_is_summed():
    tensor_map = TensorMap((6,), ((0, AxisMap.uniform(6, 2)),))
    assert not tensor_map.noise_like(torch.ones(12), std=1.0).any()


def random_axis_map(draw, ratio, largest=4):
    """Some segments of one ratio, each with a block of its own."""
    blocks = [draw.choice((1, 2, 3)) for _ in range(draw.choice((1, 1, 2, 3)))]
    return AxisMap(Segment(block * draw.randint(1, largest), ratio, block) for block in blocks)


def random_tensor_map(draw):
    """A weight (..., outputs, ..., inputs, ...): axes in any order, with segments, some of them flattened into one."""
    outputs = [random_axis_map(draw, draw.choice((1, 2, 3)), largest=2) for _ in range(draw.choice((0, 1, 2)))]
    inputs = random_axis_map(draw, draw.choice((2, 3, 4)), largest=2)
    if outputs and draw.random() < 0.3:  # one axis of (outputs, inputs): first outputs are replicated, in whole rows
        first = AxisMap(Segment(s.size * inputs.size, s.ratio, s.block * inputs.size) for s in outputs[0])
        rows = first.teacher_size // inputs.size
        last = AxisMap(inputs * rows)
        return TensorMap((first.size, 2), ((0, first), (0, last)), sum_axis=0)
    maps = [*outputs, inputs]
    draw.shuffle(maps)
    sum_axis = next(axis for axis, axis_map in enumerate(maps) if axis_map is inputs)
    axes = [pair for pair in enumerate(maps) if pair[1].ratio > 1]
    draw.shuffle(axes)
    return TensorMap((*(axis_map.size for axis_map in maps), 2), tuple(axes), sum_axis)


@pytest.mark.parametrize('seed', range(60))
def test_noise_is_all_that_a_map_leaves_free(seed):
    """It vanishes in every sum over an input's replicas and where the student is sliced from, and nowhere else."""
    tensor_map = random_tensor_map(random.Random(seed))
    weight = torch.randn(tensor_map.teacher_shape, dtype=torch.float64)
    noise = tensor_map.noise_like(weight, std=1.0)
    assert noise.shape == weight.shape and noise.dtype == weight.dtype
    assert not tensor_map.first_replica(noise).any()

    # Sums over replicas, one by one. Every entry says which entry of the student it is, and which input's replica.
    axis, inputs = tensor_map.sum_axis, dict(tensor_map.axes)[tensor_map.sum_axis]
    is_students = torch.zeros(tensor_map.teacher_shape, dtype=torch.bool)
    marks = torch.arange(is_students.numel()).view(is_students.shape)
    is_students.view(-1)[tensor_map.first_replica(marks).flatten()] = True
    source = inputs.replicate(torch.arange(inputs.size), 0)
    for entry in range(inputs.size):
        replicas = noise.movedim(axis, 0)[source == entry]
        free = ~is_students.movedim(axis, 0)[source == entry]
        assert len(replicas) == tensor_map.divisor
        assert replicas.sum(0).abs().max() <= 1e-14
        has_freedom = free & (free.sum(0) > 1)
        assert torch.equal(replicas.abs() > 1e-9, has_freedom)


def test_noise_of_a_layer_that_sums_over_several_segments_keeps_its_function():
    inputs = AxisMap((Segment(4, 2, 2), Segment(3, 2)))
    tensor_map = TensorMap((5, 7), ((0, AxisMap.uniform(5, 3)), (1, inputs)), sum_axis=1)
    weight_OI = tensor_map.replicate(torch.randn(5, 7, dtype=torch.float64))
    noise_OI = tensor_map.noise_like(weight_OI, std=1.0)
    x_I = inputs.replicate(torch.randn(7, dtype=torch.float64), 0)
    assert noise_OI.any()
    torch.testing.assert_close((weight_OI + noise_OI) @ x_I, weight_OI @ x_I, rtol=0, atol=1e-13)
