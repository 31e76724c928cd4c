"""``Topology`` says what DeepSpeed does: its own process groups, of fake worlds and real ranks."""

import contextlib
import io
import itertools
from typing import Any

import pytest

from moe_groups.errors import InvalidArgumentError
from moe_groups.topology import GroupKind, Topology
from tests.support.fake_world import run_as_rank
from tests.support.ranks import run_on_ranks

LARGEST = 16


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def cuts(world: int) -> list[tuple[int, int]]:
    """Tensor-parallel sizes and numbers of stages."""
    return [(tp, pp) for tp in divisors(world) for pp in divisors(world // tp)]


def grid_of(world: int, tp: int, pp: int) -> Any:
    """The grid of a PipelineModule, which is the ``mpu`` of its engine."""
    from deepspeed.runtime.pipe.topology import (
        PipelineParallelGrid,
        PipeModelDataParallelTopology,
    )

    shape = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=world // (tp * pp))
    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineParallelGrid(shape)


def groups_of_layer(
    grid: Any, ep: int, cut_experts: bool, data_first: bool
) -> dict[GroupKind, Any]:
    """This rank's handles, as one of DeepSpeed's layers makes them in ``initialize``."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups
    from torch import nn

    groups._release_process_group_references()
    groups.mpu = grid
    layer = MoE(2, nn.Linear(2, 2), ep, ep_size=ep, enable_expert_tensor_parallelism=cut_experts)
    with contextlib.redirect_stdout(io.StringIO()):
        layer.set_deepspeed_parallelism(data_first)
    name = f"ep_size_{ep}"
    return {
        "data": groups._get_data_parallel_group(),
        "expert": groups._get_expert_parallel_group(name),
        "expert_data": groups._get_expert_data_parallel_group(name),
    }


def ranks_of_grid(grid: Any) -> dict[GroupKind, list[int]]:
    return {"data": grid.dp_group, "pipeline": grid.pp_group, "tensor": list(grid.slice_group)}


# ---- every topology of small worlds ---------------------------------------------------


def check_world(world: int, rank: int) -> tuple[int, int]:
    """Compare all topologies on one rank: how many there are, and how many both refuse."""
    made = refused = 0
    for tp, pp in cuts(world):
        grid = grid_of(world, tp, pp)
        grids = [grid, None] if tp == pp == 1 else [grid]
        flags = itertools.product((False, True), repeat=2)
        for mpu, ep, (cut, data_first) in itertools.product(grids, range(1, world + 1), flags):
            if compare(world, rank, (tp, pp, ep), cut, data_first, mpu):
                made += 1
            else:
                refused += 1
    return made, refused


def compare(
    world: int, rank: int, sizes: tuple[int, int, int], cut: bool, data_first: bool, mpu: Any
) -> bool:
    import torch

    tp, pp, ep = sizes

    def ours() -> Topology:
        return Topology(
            world_size=world,
            tp_size=tp,
            pp_size=pp,
            ep_size=ep,
            expert_tensor_parallelism=cut,
            use_data_before_expert_parallel=data_first,
        )

    try:
        found = groups_of_layer(mpu, ep, cut, data_first)
    except AssertionError:  # "... is not divisible by ..."
        with pytest.raises(InvalidArgumentError, match=f"ep_size={ep} "):
            ours()
        return False
    topology = ours()
    ranks = {key: torch.distributed.get_process_group_ranks(found[key]) for key in found}
    if mpu is not None:
        ranks |= ranks_of_grid(mpu)
    for kind, wanted in ranks.items():
        assert topology.group_of(kind, rank) == wanted, (topology, rank, kind)
    if mpu is not None:
        assert topology.stage(rank) == mpu.get_stage_id()
        assert topology.data_rank(rank) == mpu.get_data_parallel_rank()
        assert topology.tensor_rank(rank) == mpu.get_tensor_model_parallel_rank()
    assert topology.expert_rank(rank) == torch.distributed.get_rank(found["expert"])
    assert topology.expert_data_parallel_size == torch.distributed.get_world_size(
        found["expert_data"]
    )
    return True


def check_worlds(ranks: dict[int, list[int]]) -> tuple[int, int]:
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made = refused = 0
    for world, some in ranks.items():
        for rank in some:
            torch.distributed.destroy_process_group()
            torch.distributed.init_process_group(
                "fake", rank=rank, world_size=world, store=FakeStore()
            )
            counts = check_world(world, rank)
            made, refused = made + counts[0], refused + counts[1]
    return made, refused


def test_topologies_of_small_worlds_are_deepspeeds() -> None:
    ranks = {4: [3], 8: [6], 12: [7], 16: [10]}
    made, refused = run_as_rank(0, LARGEST, check_worlds, ranks)
    assert (made, refused) == (620, 1780)


@pytest.mark.long
def test_all_topologies_are_deepspeeds_on_every_rank() -> None:
    ranks = {world: list(range(world)) for world in range(1, LARGEST + 1)}
    made, refused = run_as_rank(0, LARGEST, check_worlds, ranks)
    assert (made, refused) == (13320, 47860)


# ---- real ranks -----------------------------------------------------------------------


def members(group: Any) -> list[int]:
    """The ranks whose ones arrive in a sum over the group."""
    import torch

    ones = torch.zeros(torch.distributed.get_world_size())
    ones[torch.distributed.get_rank()] = 1
    torch.distributed.all_reduce(ones, group=group)
    return [int(rank) for rank in ones.nonzero().flatten()]


def sum_over_groups(
    tp: int, pp: int, ep: int, cut: bool, data_first: bool
) -> dict[GroupKind, list[int]]:
    """What is summed with this rank's values, in the groups of a PipelineModule's MoE layer."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from torch import nn

    shape = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=4 // (tp * pp))
    with contextlib.redirect_stdout(io.StringIO()):
        model = PipelineModule([LayerSpec(nn.Linear, 2, 2) for _ in range(pp)], topology=shape)
    found = groups_of_layer(model.mpu(), ep, cut, data_first)
    return {kind: members(found[kind]) for kind in found}


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "cut", "data_first"),
    [
        (1, 2, 2, False, False),
        (1, 2, 1, False, True),
        (2, 1, 2, True, False),
        (2, 1, 2, False, False),
        (2, 1, 4, False, False),
        (1, 1, 2, False, True),
        (2, 2, 2, False, False),
    ],
)
def test_collectives_of_real_ranks_reach_these_ranks(
    tp: int, pp: int, ep: int, cut: bool, data_first: bool
) -> None:
    topology = Topology(
        world_size=4,
        tp_size=tp,
        pp_size=pp,
        ep_size=ep,
        expert_tensor_parallelism=cut,
        use_data_before_expert_parallel=data_first,
    )
    answers = run_on_ranks(4, sum_over_groups, tp, pp, ep, cut, data_first)
    for rank, found in enumerate(answers):
        for kind, ranks in found.items():
            assert topology.group_of(kind, rank) == ranks


def engine_groups() -> dict[GroupKind, list[int]]:
    from tests.support.pipeline_runs import start_pipeline

    engine = start_pipeline("zero1", "module", stages=2)
    return {
        "data": members(engine.grid.get_data_parallel_group()),
        "expert": members(engine.expert_parallel_group["ep_size_2"]),
        "expert_data": members(engine.expert_data_parallel_group["ep_size_2"]),
    }


def test_a_pipeline_engine_has_these_groups() -> None:
    topology = Topology(world_size=4, pp_size=2, ep_size=2)
    for rank, found in enumerate(run_on_ranks(4, engine_groups)):
        for kind, ranks in found.items():
            assert topology.group_of(kind, rank) == ranks
