"""Memory of a step's own tensors: what is kept lies apart from what passes, nothing is anybody's twice, idle memory goes back."""

from __future__ import annotations

import gc
import itertools
import mmap
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowprec.numerics import pools
from lowprec.numerics.pools import LEAST, PIECE, converted, kept_like, passing_like

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these are any new tensors")
LIKE = torch.empty(())


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pools._Pool]:
    made = pools._Pool()
    monkeypatch.setattr(pools, "_pool", made)
    yield made
    gc.collect()


def kept(*shape: int) -> Tensor:
    return kept_like(LIKE, torch.uint8, shape)


def passing(*shape: int) -> Tensor:
    return passing_like(LIKE, torch.uint8, shape)


@pytest.mark.parametrize("place", [kept_like, passing_like])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shape_strides_and_dtype(
    place: Callable[..., Tensor], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    values = torch.empty(4, 16, 40, 50).contiguous(memory_format=memory_format)
    found = place(values, dtype)
    assert (found.shape, found.stride(), found.dtype) == (values.shape, values.stride(), dtype)
    assert found.data_ptr() % pools.ALIGNMENT == 0
    assert not found._is_view()
    assert found.untyped_storage().nbytes() == found.nbytes
    assert place(values, shape=(3, 7)).stride() == (7, 1)


@given(st.lists(st.tuples(st.integers(1, 3 * PIECE // 2), st.booleans()), min_size=1, max_size=12))
def test_no_two_tensors_share_memory(sizes: list[tuple[int, bool]]) -> None:
    """Some are freed at once, so that their memory is another's."""
    alive = []
    for size, stays in sizes:
        for make in (kept, passing):
            tensor = make(size)
            tensor[0] = tensor[-1] = len(alive)
            if stays:
                alive.append(tensor)
    stretches = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in alive)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(stretches))
    assert all(tensor[0] == tensor[-1] for tensor in alive)


def test_what_is_kept_lies_side_by_side_and_comes_back_when_all_of_it_is_free(pool: pools._Pool) -> None:
    first, second = kept(1000), kept(1)
    assert second.data_ptr() == first.data_ptr() + 1024
    del first
    third = kept(1)
    assert third.data_ptr() == second.data_ptr() + 64
    del second, third
    again = kept(PIECE)
    assert len(pool.kept) == 1
    assert kept(1).data_ptr() not in range(again.data_ptr(), again.data_ptr() + PIECE)
    assert len(pool.kept) == 2


def test_a_block_with_room_is_found_again(pool: pools._Pool) -> None:
    tensors = [kept(PIECE - 4096), kept(2 * PIECE), kept(4096)]
    assert len(pool.kept) == 2
    assert tensors[2].data_ptr() == tensors[0].data_ptr() + PIECE - 4096


def test_what_passes_takes_the_smallest_idle_memory(pool: pools._Pool) -> None:
    large, small = passing(3 * LEAST), passing(2 * LEAST)
    places = large.data_ptr(), small.data_ptr()
    del large, small
    assert passing(LEAST).data_ptr() == places[1]
    held = passing(LEAST), passing(LEAST)
    assert [tensor.data_ptr() for tensor in held] == [places[1], places[0]]
    assert len(pool.passing) == 2


def test_what_passes_takes_no_memory_that_is_much_too_large(pool: pools._Pool) -> None:
    """Some of it stays, and would hold all."""
    passing(pools.LARGER * LEAST + mmap.PAGESIZE)
    passing(LEAST)
    assert [block.size for block in pool.passing] == [pools.LARGER * LEAST + mmap.PAGESIZE, LEAST]


def test_small_passing_tensors_are_any_new_ones(pool: pools._Pool) -> None:
    assert passing(LEAST - 1).shape == (LEAST - 1,)
    assert kept(0).shape == (0,)
    assert not pool.passing
    assert not pool.kept


def test_views_hold_their_memory() -> None:
    view = passing(LEAST).view(2, -1)[1:]
    assert passing(LEAST).data_ptr() != view.data_ptr() - LEAST // 2


def test_only_idle_memory_is_released(pool: pools._Pool) -> None:
    tensors = kept(64).fill_(3), passing(LEAST).fill_(5)
    memory = [weakref.ref(block.memory) for block in (*pool.kept, *pool.passing)]
    pools.release()
    assert all(reference() is not None for reference in memory)
    assert tensors[0].sum() == 64 * 3
    assert tensors[1].sum() == LEAST * 5
    del tensors
    pools.release()
    assert all(reference() is None for reference in memory)
    assert not pool.kept
    assert not pool.passing


def test_memory_that_nobody_uses_any_more_is_released_in_time(
    pool: pools._Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 10)
    passing(8 * LEAST)
    for _ in range(25):
        kept(1)
    assert not pool.passing
    assert len(pool.kept) == 1


def test_elsewhere_than_on_a_cpu_they_are_any_new_tensors(pool: pools._Pool) -> None:
    values = torch.empty(100, LEAST, device="meta")
    for place in (kept_like, passing_like):
        assert place(values, torch.int8).device.type == "meta"
        assert place(values, shape=(LEAST,)).shape == (LEAST,)
    assert not pool.kept
    assert not pool.passing


def test_what_is_compiled_has_memory_of_its_own(pool: pools._Pool) -> None:
    compiled = torch.compile(lambda values: passing_like(values).copy_(values) + 1, backend="eager", fullgraph=True)
    values = torch.ones(LEAST)
    assert torch.equal(compiled(values), values + 1)
    assert not pool.passing


def test_a_dtype_that_is_there_already_costs_nothing(pool: pools._Pool) -> None:
    values = torch.arange(LEAST, dtype=torch.float32)
    assert converted(values, torch.float32, passing_like) is values
    found = converted(values % 128, torch.bfloat16, passing_like)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), values % 128)
    assert len(pool.passing) == 1


@pytest.mark.parametrize("place", [kept_like, passing_like])
def test_of_what_is_not_dense_a_new_tensor_has_room_for_all(place: Callable[..., Tensor]) -> None:
    values = torch.empty(LEAST, 4)[:, :2]
    found = place(values)
    assert found.shape == values.shape
    assert found.fill_(1).sum() == 2 * LEAST


def test_where_there_is_no_more_memory_pytorch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: int) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(pools, "_Block", fail)
    assert kept(LEAST).shape == passing(LEAST).shape == (LEAST,)
    with pytest.raises(RuntimeError, match=r"not enough memory|can't allocate memory"):
        kept(1 << 60)


def test_threads_get_memory_of_their_own(pool: pools._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others come by between the choice of a place and the tensor that holds it; what each wrote is what it reads."""
    for name in ("keep", "pass_on"):
        find = getattr(pool, name)
        monkeypatch.setattr(pool, name, lambda size, find=find: (find(size), time.sleep(0.001))[0])

    def work(number: int) -> int:
        wrong = 0
        for turn in range(25):
            tensors = [kept(1000 + turn).fill_(number), passing(LEAST + turn).fill_(number)]
            time.sleep(0.001)
            wrong += sum(int((tensor != number).any()) for tensor in tensors)
        return wrong

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) == 0
