"""Engines that are saved and loaded, and what the tests of checkpoints compare."""

import contextlib
import io
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import distributed, nn

from moe_groups import MoE, protect_checkpoints
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.layout import Rank
from moe_groups.checkpoints.manifest import FILE_NAME
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning
from tests.support.models import FFN, HIDDEN, TinyMoE
from tests.support.training import GroupsOf, groups_by, make_groups, start, train, weights

WRAPPERS = ("zero1", "zero2", "bf16")
EP2 = {"ep_size": 2, "layers": 2}
TAG = "global_step2"
EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"


def on_first_rank(action: Callable[[], Any]) -> None:
    """Change files while no rank reads them."""
    distributed.barrier()
    if distributed.get_rank() == 0:
        action()
    distributed.barrier()


def saved(wrapper: str, groups_of: GroupsOf, folder: Path, **options: Any) -> Any:
    """An engine that trained two steps and was saved, DeepSpeed's groups guarded like ours."""
    engine = started(wrapper, groups_of, **options)
    protect_checkpoints(engine)
    train(engine, 2)
    engine.save_checkpoint(str(folder))
    return engine


def started(wrapper: str, groups_of: GroupsOf, **options: Any) -> Any:
    return start(wrapper, groups_of, **{"model_options": EP2} | options)


def error_of(engine: Any, folder: Path, **options: Any) -> Any:
    """What loading raises; None if it loads."""
    try:
        engine.load_checkpoint(str(folder), **options)
    except CheckpointError as error:
        return error
    return None


def refusal_of(engine: Any, folder: Path) -> str | None:
    error = error_of(engine, folder)
    assert error is None or isinstance(error, CheckpointMismatchError), error
    return None if error is None else str(error)


def forget_manifest(folder: Path) -> None:
    on_first_rank(lambda: (folder / TAG / FILE_NAME).unlink())


def to_universal(folder: Path) -> None:
    """Convert ``saved/t`` to ``universal/t`` with DeepSpeed's own script; all ranks wait for it."""
    arguments = Namespace(
        input_folder=str(folder / "saved" / "t"),
        output_folder=str(folder / "universal" / "t"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        on_first_rank(lambda: ds_to_universal.main(arguments))


def universal_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and steps of a universal checkpoint, whole, by their files."""
    zero = folder / "universal" / "t" / "zero"
    files = sorted(path for path in zero.rglob("*.pt") if path.parent != zero)
    found = {str(path.relative_to(zero)): torch.load(path, weights_only=False) for path in files}
    values = {key: v["param"] if isinstance(v, dict) else v for key, v in found.items()}
    return {key: torch.as_tensor(value) for key, value in values.items()}


def options_of(engine: Any) -> list[dict[str, Any]]:
    groups = engine.optimizer.param_groups
    return [{key: group[key] for key in group if key != "params"} for group in groups]


def shard(folder: Path, rank: int, tag: str = TAG) -> Path:
    return find_checkpoint(folder, tag).shards[Rank(0, rank)]


class Case(NamedTuple):
    wrapper: str
    split: str = "module"
    ep_size: int = 2
    cap: int | None = None
    zero: dict[str, Any] = {}  # noqa: RUF012
    model: type[TinyMoE] = TinyMoE

    def engine(self) -> Any:
        options: dict[str, Any] = {}
        if self.zero:
            stage = 2 if self.wrapper.startswith("zero2") else 1
            options = {"zero_optimization": {"stage": stage, **self.zero}}
        model = self.model(MoE, ep_size=self.ep_size)
        return start(self.wrapper, groups_by(self.split, self.cap), model, **options)


ROUND_ROBIN = {"round_robin_gradients": True, "contiguous_gradients": True}
ALIGNED = {"parameter_alignment": True}


def snapshot(engine: Any) -> dict[str, Any]:
    """All that loading could change; tensors are copies."""
    states = engine.optimizer.state
    return {
        "masters": weights(engine),
        "weights": {name: p.detach().clone() for name, p in engine.module.named_parameters()},
        "states": [copied(states[p]) for g in engine.optimizer.param_groups for p in g["params"]],
        "groups": options_of(engine),
        "counters": (engine.global_steps, engine.global_samples, engine.micro_steps),
        "skipped": engine.skipped_steps,
        "scheduler": engine.lr_scheduler and dict(engine.lr_scheduler.state_dict()),
    }


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def falling(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def reordered(split: str, *order: int) -> GroupsOf:
    return lambda model: [make_groups(model, split)[index] for index in order]


ROUTING = {"k": 1, "min_capacity": 0, "drop_tokens": False, "use_rts": False}


class Odd(TinyMoE):
    """Experts of 165 elements, so that groups have padding."""

    def __init__(self, layer: type[nn.Module], ep_size: int) -> None:
        super().__init__(layer, ep_size=ep_size)
        for block in self.blocks:
            block.moe = layer(HIDDEN, FFN(inner=5), num_experts=4, ep_size=ep_size, **ROUTING)


class Mixed(TinyMoE):
    """Two MoE layers with different ep_size, whose groups have partitions of one size."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__(layer, num_experts=2, ep_size=1)
        experts = FFN(inner=12)  # half the elements on half as many ranks
        self.blocks[1].moe = layer(HIDDEN, experts, num_experts=4, ep_size=2, **ROUTING)


@contextlib.contextmanager
def collected() -> Iterator[list[tuple[str, str]]]:
    """Our warnings: text and file that they point to."""
    found: list[tuple[str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [(str(w.message), w.filename) for w in caught if w.category is CheckpointWarning]
