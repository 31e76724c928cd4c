"""The launcher itself: a test that hangs fails, and says which rank waits in what."""

import signal
import time

import pytest
import torch

from tests.support.ranks import RankError, run_in_fresh_processes, run_on_ranks


def one_rank_sleeps() -> None:
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(torch.zeros(1))
    else:
        time.sleep(60)


def one_rank_raises() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("no such expert")
    torch.distributed.barrier()


def who_am_i(offset: int) -> int:
    return torch.distributed.get_rank() + offset


@pytest.mark.long
def test_hang_names_rank_and_collective() -> None:
    with pytest.raises(RankError, match="one_rank_sleeps: not done after 3 s") as failure:
        run_in_fresh_processes(2, one_rank_sleeps, timeout=3)
    first, second = str(failure.value).split("rank 1 is waiting in:")
    assert "rank 0 is waiting in:" in first
    assert "in all_reduce" in first
    assert "in one_rank_sleeps" in first
    assert "in all_reduce" not in second
    assert "in one_rank_sleeps" in second


def put_signals_back() -> None:
    """As Lightning does after a fit: by what Python knows of them."""
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR1))


@pytest.mark.long
def test_error_of_one_rank_ends_the_others() -> None:
    run_on_ranks(2, put_signals_back)
    began = time.monotonic()
    with pytest.raises(RankError) as failure:
        run_on_ranks(2, one_rank_raises)
    assert time.monotonic() - began < 60, "waited for the rank that hangs"
    first, second = str(failure.value).split("rank 1: ")
    assert "in barrier" in first
    assert "ValueError: no such expert" in second
    assert run_on_ranks(2, who_am_i, 10) == [10, 11], "the pool does not start again"
