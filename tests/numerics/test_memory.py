"""Elements in the order of memory."""

from __future__ import annotations

import torch

from lowprec.numerics.memory import in_memory_order, is_channels_last, is_dense


def test_dense_tensors_are_not_copied() -> None:
    usual = torch.arange(120.0).view(2, 3, 4, 5)
    last = usual.contiguous(memory_format=torch.channels_last)
    assert (is_dense(usual), is_channels_last(usual)) == (True, False)
    assert (is_dense(last), is_channels_last(last)) == (True, True)
    assert torch.equal(in_memory_order(usual), usual.flatten())
    assert torch.equal(in_memory_order(last), usual.permute(0, 2, 3, 1).flatten())
    for tensor in (usual, last, usual[1:], last[1:]):
        assert in_memory_order(tensor).data_ptr() == tensor.data_ptr()


def test_others_are_copied_in_the_usual_order() -> None:
    values = torch.arange(120.0).view(2, 3, 4, 5)
    for tensor in (values[:, 1:], values.transpose(1, 2), values[..., ::2], values[:, :1].expand(-1, 3, -1, -1)):
        assert not is_dense(tensor)
        assert torch.equal(in_memory_order(tensor), tensor.flatten())
