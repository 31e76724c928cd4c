"""``MoE``: DeepSpeed's layer whose experts know their layer and number."""

import copy
from typing import Any, Literal

import torch
from torch import nn

from moe_groups._common.arguments import Count, NotNegative, checked, need
from moe_groups._deepspeed.contract import check_contract
from moe_groups._deepspeed.layers import layer_experts, layer_parallel_group
from moe_groups._deepspeed.releases import need as need_release
from moe_groups.errors import InvalidArgumentError
from moe_groups.tags import (
    ExpertTag,
    check_label,
    copy_expert_tag,
    is_expert_parameter,
    new_layer_id,
    set_expert_tag,
)

need("deepspeed", "deepspeed", "MoE layers")

from deepspeed.moe.layer import MoE as DeepSpeedMoE  # noqa: E402

check_contract()  # now, and not in the middle of a run


@checked
class MoE(DeepSpeedMoE):
    """DeepSpeed's mixture-of-experts layer with an ``expert_group_name``.

    Computes what ``deepspeed.moe.layer.MoE`` computes and has the same state dict. Each
    expert parameter carries ``expert_group_name`` and ``expert_number`` (0 to
    ``num_local_experts - 1``, the same on every rank) besides DeepSpeed's ``allreduce``
    and ``group_name``, and keeps them through ``copy.deepcopy`` and ``pickle``.

    All arguments but the last are DeepSpeed's (``deepspeed/moe/layer.py``).

    Args:
        hidden_size: size of the last dimension of input and output.
        expert: module that is copied for each local expert.
        num_experts: experts of the layer over all ranks.
        ep_size: ranks that share the experts; divides ``num_experts``.
        expert_group_name: label of this layer, unique in the model, without white space.
            None: the qualified module name, taken when the layer is grouped.

    The layer's attribute ``expert_group_name`` is DeepSpeed's: the process-group key
    ``ep_size_<N>``. The label is ``group_label``.

    Raises:
        InvalidArgumentError: an argument has another type or range.
        TagError: the label cannot be part of a process-group key.
        UnsupportedDeepSpeedError: k above 2 with DeepSpeed before 0.15.

    Example:
        >>> moe = MoE(64, expert=FFN(64), num_experts=8, ep_size=2, k=2,
        ...           expert_group_name="layers.3.moe")           # doctest: +SKIP
        >>> out, aux_loss, counts = moe(x)      # x, out: (batch, sequence, 64)  # doctest: +SKIP
    """

    def __init__(
        self,
        hidden_size: Count,
        expert: nn.Module,
        num_experts: Count = 1,
        ep_size: Count = 1,
        k: Count = 1,
        capacity_factor: NotNegative = 1.0,
        eval_capacity_factor: NotNegative = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: Literal["None", "Jitter", "RSample"] | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        expert_group_name: str | None = None,
    ) -> None:
        if expert_group_name is not None:
            check_label(expert_group_name)
        if num_experts % ep_size:
            raise InvalidArgumentError(
                f"num_experts={num_experts} is no multiple of ep_size={ep_size}: each rank has the "
                "same number of experts."
            )
        if k > 2:
            need_release("top-k gating", "set k to 1 or 2")
        super().__init__(
            hidden_size,
            expert,
            num_experts,
            ep_size,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            use_residual,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            use_tutel,
            enable_expert_tensor_parallelism,
            top2_2nd_expert_sampling,
        )
        self.group_label = expert_group_name
        parallel_group = layer_parallel_group(self)
        experts = layer_experts(self)
        for number, local_expert in enumerate(experts):
            tag = ExpertTag(parallel_group, expert_group_name, number, len(experts))
            for param in local_expert.parameters():
                set_expert_tag(param, tag)
        self._set_layer_id(new_layer_id())

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoE":
        """Copy with the tags, which ``Parameter.__deepcopy__`` loses.

        Process groups are shared and the last auxiliary loss is detached: neither can be
        copied, and DeepSpeed's layer holds both once it has run.
        """
        for value in vars(self.deepspeed_moe).values():
            if isinstance(value, torch.distributed.ProcessGroup):
                memo[id(value)] = value
            elif isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        copied: MoE = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for source, target in zip(self.parameters(), copied.parameters(), strict=True):
            copy_expert_tag(source, target)
        copied._set_layer_id(new_layer_id())
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle as a new layer, distinct from other layers of this process."""
        super().__setstate__(state)
        self._set_layer_id(new_layer_id())

    def _set_layer_id(self, layer_id: int) -> None:
        for param in filter(is_expert_parameter, self.parameters()):
            param.expert_layer_id = layer_id
