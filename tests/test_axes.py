"""The tensor algebra: replication, slicing, and noise that changes nothing."""

import itertools

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
