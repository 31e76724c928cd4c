"""The one place that touches DeepSpeed's private parts.

Tested against the version in ``constraints.txt``; ``tests/distributed/test_contract*.py``
hold one test for each fact relied on here. DeepSpeed is imported when a function needs
it, never when this package is imported; where it is there already, a release that lacks
what is relied on is refused at once (:func:`check_contract`).

What :func:`support_our_groups` changes in DeepSpeed (groups that DeepSpeed made itself
train as before, bit for bit, but where its norm was wrong and clipping uses it):

* the ZeRO-1/2 and BF16 wrappers look up a group's ``name`` as a process-group key, so
  unique names get aliases of the key ``ep_size_<N>`` (the same handle, no communicator),
  registered by the engine after it created the process groups;
* ``BF16_Optimizer`` and ``FP16_Optimizer`` run one all-reduce of the norm for each name
  that has a gradient on this rank, which hangs when ranks disagree, and clip by different
  norms where ranks that share an expert disagree: names are merged to one per parallel
  group before the norm and the reduction see them, and all experts count. Sums are then
  those of DeepSpeed's own names, bit for bit;
* stages of a pipeline make the same process groups, and take part in each other's
  all-reduces of the norm (ZeRO-1 runs one for each group, BF16_Optimizer one for each
  parallel group), where DeepSpeed waits for ever unless all stages are alike;
* ZeRO's norm counts the experts of all tensor-parallel ranks;
* gloo gathers tokens over tensor-parallel ranks;
* parameters under Muon are those of the groups that say ``use_muon``, and what cannot step
  our groups (the config's Muon, ``torch.optim.Muon`` under ZeRO) is refused;
* ``save_checkpoint`` and ``load_checkpoint`` write and compare what the groups were
  (``checkpoint_guard.py``);
* ``BF16_Optimizer`` collects garbage and prints the memory twice for each group while it
  is set up, 0.3 s a group: not for more groups than a handful.

What :func:`support_kept_collectives` changes, for functions in ``checkpoint_activations``
alone: the MoE layers' collectives give the results of the forward pass in a recomputation.
"""

import sys

from moe_groups._deepspeed.around_step import (
    before_own_clipping,
    check_steps_partitions,
    clipping_divisor,
    is_counted,
)
from moe_groups._deepspeed.checkpoints import (
    LaidOut,
    checkpoint_rank,
    checkpoint_tag,
    laid_out_groups,
)
from moe_groups._deepspeed.collectives import support_kept_collectives
from moe_groups._deepspeed.contract import check_contract, support_our_groups
from moe_groups._deepspeed.engines import (
    Given,
    backward_scale,
    engine_data_parallel_group,
    given_options,
    guard_of,
    has_engine,
    is_engine,
    is_pipeline,
    known_engines,
    refresh_master_weights,
    runs_backward,
    scheduled_peaks,
    set_guard,
    stage_of,
    stepped_groups,
    steps_parameters,
    wrapper_name,
)
from moe_groups._deepspeed.exact_partitions import keep_exact_partitions
from moe_groups._deepspeed.layers import (
    LayerParts,
    is_partitioned,
    layer_experts,
    layer_parallel_group,
    layer_parts,
    moe_layer_types,
    routed,
    routers_of,
)
from moe_groups._deepspeed.process_groups import (
    expert_data_parallel_size,
    expert_parallel_rank,
    expert_parallel_ranks,
    expert_place,
    resolves,
    tensor_parallel_size,
)

__all__ = [
    "Given",
    "LaidOut",
    "LayerParts",
    "backward_scale",
    "before_own_clipping",
    "check_contract",
    "check_steps_partitions",
    "checkpoint_rank",
    "checkpoint_tag",
    "clipping_divisor",
    "engine_data_parallel_group",
    "expert_data_parallel_size",
    "expert_parallel_rank",
    "expert_parallel_ranks",
    "expert_place",
    "given_options",
    "guard_of",
    "has_engine",
    "is_counted",
    "is_engine",
    "is_partitioned",
    "is_pipeline",
    "keep_exact_partitions",
    "known_engines",
    "laid_out_groups",
    "layer_experts",
    "layer_parallel_group",
    "layer_parts",
    "moe_layer_types",
    "refresh_master_weights",
    "resolves",
    "routed",
    "routers_of",
    "runs_backward",
    "scheduled_peaks",
    "set_guard",
    "stage_of",
    "stepped_groups",
    "steps_parameters",
    "support_kept_collectives",
    "support_our_groups",
    "tensor_parallel_size",
    "wrapper_name",
]

if sys.modules.get("deepspeed") is not None:
    check_contract()
