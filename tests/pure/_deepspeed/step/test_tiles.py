"""Tiles: an elementwise optimizer steps slices as it steps the whole, bit for bit."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_groups import measure_step_memory
from moe_groups._deepspeed.step import tiles
from moe_groups.errors import InvalidArgumentError

SIZE = 5 * tiles.ALIGNED + 3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"foreach": False}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.1), "fused": True}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
}


def made(name: str, seed: int = 0) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    kind, options = OPTIMIZERS[name]
    param = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    optimizer: Any = kind([{"params": [param], "name": "experts"}], **copy.deepcopy(options))
    return optimizer, param


def step(optimizer: torch.optim.Optimizer, param: torch.Tensor, seed: int, most: int) -> None:
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    if most:
        (group,) = optimizer.param_groups
        tiles.step_in_tiles(optimizer, group, lambda start, end: gradient[start:end].clone(), most)
    else:
        param.grad = gradient
        optimizer.step()
        param.grad = None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def assert_same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Parameters, states in the same order, and options."""
    for here, there in zip(one.param_groups, other.param_groups, strict=True):
        assert here.keys() == there.keys()
        assert all(same(here[key], there[key]) for key in here if key != "params")
        for param, expected in zip(there["params"], here["params"], strict=True):
            assert torch.equal(param, expected)
            state, before = other.state.get(param, {}), one.state.get(expected, {})
            assert list(state) == list(before)
            assert all(same(before[key], state[key]) for key in before)
    assert len(one.state) == len(other.state)


@pytest.mark.parametrize("most", [tiles.ALIGNED, 3 * tiles.ALIGNED])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tiles_equal_the_whole(name: str, most: int) -> None:
    """With state that a step has made, that tiles have made, and that was loaded."""
    plain, tiled = made(name), made(name)
    tiles.check_elementwise(tiled[0])
    for number, size in enumerate((most, 0, most, most)):
        step(*plain, number, 0)
        step(*tiled, number, size)
        assert_same(plain[0], tiled[0])
    loaded = made(name, seed=1)
    with torch.no_grad():
        loaded[1].copy_(tiled[1])
    loaded[0].load_state_dict(copy.deepcopy(tiled[0].state_dict()))
    step(*plain, 9, 0)
    step(*loaded, 9, most)
    assert_same(plain[0], loaded[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_temporaries_of_a_tile(name: str) -> None:
    """In a step after the first: the gradient's copy and what the optimizer takes besides."""
    optimizer, param = made(name)
    step(optimizer, param, 0, 4 * tiles.ALIGNED)
    gradient = torch.randn(SIZE)
    (group,) = optimizer.param_groups

    def copied(start: int, end: int) -> torch.Tensor:
        return gradient[start:end].clone()

    with measure_step_memory(torch.device("cpu")) as memory:
        tiles.step_in_tiles(optimizer, group, copied, 4 * tiles.ALIGNED)
    most = tiles.bytes_per_element(optimizer) * 4 * tiles.ALIGNED
    assert 4 * 4 * tiles.ALIGNED <= memory.step_peak <= most + 1024  # scalars


def test_states_keep_their_identity() -> None:
    """DeepSpeed holds slices of them."""
    optimizer, param = made("AdamW fused")
    step(optimizer, param, 0, tiles.ALIGNED)
    before = dict(optimizer.state[param])
    step(optimizer, param, 1, tiles.ALIGNED)
    assert all(optimizer.state[param][key] is before[key] for key in before)
    assert list(optimizer.state) == [param]


def test_a_state_without_a_tensor_yet() -> None:
    optimizer, param = made("SGD momentum")
    optimizer.state[param]["momentum_buffer"] = None
    plain = made("SGD momentum")
    step(optimizer, param, 0, tiles.ALIGNED)
    step(*plain, 0, 0)
    assert_same(plain[0], optimizer)


class NotElementwise(torch.optim.Adafactor):
    pass


Pretender = type("AdamW", (torch.optim.SGD,), {"__module__": "torch.optimizers_of_mine"})


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.Adafactor, "cannot step torch.optim.Adafactor in tiles"),
        (torch.optim.LBFGS, "cannot step torch.optim.lbfgs.LBFGS in tiles"),
        (NotElementwise, "NotElementwise in tiles: it is not known"),
        (Pretender, "cannot step torch.optimizers_of_mine.AdamW in tiles"),
    ],
)
def test_others_are_refused_by_name(optimizer: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as failure:
        tiles.check_elementwise(optimizer([torch.zeros(3, requires_grad=True)]))
    assert words in str(failure.value)
    assert "Use one of AdamW, Adam," in str(failure.value)


def test_a_differentiable_optimizer_is_refused() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)], differentiable=True)
    with pytest.raises(InvalidArgumentError, match="differentiable=True"):
        tiles.check_elementwise(optimizer)


# ---- cutting --------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_batches_hold_what_fits_in_order(sizes: list[int], most: int) -> None:
    found = list(tiles.batches(sizes, most))
    assert [index for batch in found for index in batch] == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in batch) for batch in found]
    assert all(total <= most or len(batch) == 1 for total, batch in zip(totals, found, strict=True))
    for (total, _), (_, batch) in pairwise(zip(totals, found, strict=True)):
        assert total + sizes[batch[0]] > most  # no two batches could have been one


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_slices_cover_each_element_once(size: int, most: int) -> None:
    found = [element for start, end in tiles.slices(size, most) for element in range(start, end)]
    assert found == list(range(size))
    assert all(end - start <= most for start, end in tiles.slices(size, most))


def test_bytes_of_a_tile() -> None:
    smallest = tiles.ALIGNED * tiles.BYTES_PER_ELEMENT
    assert tiles.elements_of(smallest) == tiles.elements_of(2 * smallest - 1) == tiles.ALIGNED
    with pytest.raises(InvalidArgumentError, match=rf"tile={smallest - 1} bytes .* {smallest}\.$"):
        tiles.elements_of(smallest - 1)


# ---- hooks ----------------------------------------------------------------------------


class Hook:
    def __init__(self, needs_gradients: bool) -> None:
        self.needs_gradients, self.calls = needs_gradients, 0

    def seen(self, *_: object) -> None:
        self.calls += 1


def test_hooks_are_called_once_around_all_tiles() -> None:
    optimizer, param = made("AdamW")
    before, after, everywhere = Hook(False), Hook(False), Hook(False)
    optimizer.register_step_pre_hook(before.seen)
    optimizer.register_step_post_hook(after.seen)
    handle = register_optimizer_step_pre_hook(everywhere.seen)
    try:
        with tiles.around_hooks(optimizer):
            assert (before.calls, after.calls, everywhere.calls) == (1, 0, 1)
            step(optimizer, param, 0, tiles.ALIGNED)
        assert (before.calls, after.calls, everywhere.calls) == (1, 1, 1)
        step(optimizer, param, 1, 0)
        assert (before.calls, after.calls, everywhere.calls) == (2, 2, 2)
    finally:
        handle.remove()


def test_hooks_come_back_after_an_error() -> None:
    optimizer, param = made("AdamW")
    hook = Hook(False)
    optimizer.register_step_pre_hook(hook.seen)
    optimizer.register_step_post_hook(hook.seen)
    with pytest.raises(ZeroDivisionError), tiles.around_hooks(optimizer):
        raise ZeroDivisionError
    assert hook.calls == 1  # as in torch, none after a step that failed
    step(optimizer, param, 0, 0)
    assert hook.calls == 3


def test_which_hooks_need_gradients() -> None:
    optimizer, _ = made("AdamW")
    assert not tiles.need_gradients(optimizer)
    optimizer.register_step_pre_hook(Hook(False).seen)
    assert not tiles.need_gradients(optimizer)
    handle = optimizer.register_step_post_hook(Hook(True).seen)
    assert tiles.need_gradients(optimizer)
    handle.remove()
    optimizer.register_step_post_hook(torch.optim.lr_scheduler.LRScheduler.step)  # type: ignore[arg-type]
    assert not tiles.need_gradients(optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert tiles.need_gradients(optimizer)
