"""The step of ZeRO-1/2 in tiles, with few collectives for any groups.

Follows ``DeepSpeedZeroOptimizer.step`` (``runtime/zero/stage_1_and_2.py``). The methods are
replaced on one optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_groups._common.warn import warn
from moe_groups._deepspeed.step import tiles
from moe_groups._deepspeed.step.exact_partitions import check_can_be_exact, keep_exact_partitions
from moe_groups._deepspeed.step.gathering import Gathering
from moe_groups._deepspeed.step.lean_bf16 import Bf16Step
from moe_groups._deepspeed.step.norms import groups_of_stages, same_on_all_stages
from moe_groups.errors import CostlyGroupsWarning, InvalidArgumentError

_LEAN = "_moe_groups_lean_step"


def step_lean(engine: Any, tile_bytes: int) -> None:
    """Make the engine's wrapper step in tiles that take at most ``tile_bytes``.

    Raises:
        InvalidArgumentError: this engine does not support it; it is not changed then.
        UnsupportedDeepSpeedError: this DeepSpeed lacks exact partitions.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    wrapper = engine.optimizer
    kind = Bf16Step if isinstance(wrapper, BF16_Optimizer) else ZeroStep
    known: ZeroStep | Bf16Step | None = getattr(wrapper, _LEAN, None)
    if known is None:
        if kind is ZeroStep:
            check_can_be_exact(engine, "lean_step")
        if problem := _why_not_lean(wrapper):
            raise InvalidArgumentError(f"lean_step cannot be used on this engine: {problem}.")
        tiles.check_elementwise(wrapper.optimizer)
    each = tiles.bytes_per_element(wrapper.optimizer)
    most = tiles.elements_of(tile_bytes, each=each)
    gathering = kind.gathers(wrapper, tile_bytes)
    if known is None:
        if kind is ZeroStep:
            keep_exact_partitions(engine, "lean_step")
        known = kind(wrapper)
        setattr(wrapper, _LEAN, known)
    known.most, known.tile_bytes, known.gathering = most, tile_bytes, gathering


def _why_not_lean(wrapper: Any) -> str | None:
    """Why this wrapper cannot step in tiles, though it is the right one; None if it can."""
    if any(group.get("use_muon") for group in wrapper.param_groups):
        return (
            "Muon steps whole matrices. Leave out the call, or step all parameters with another "
            "optimizer"
        )
    if getattr(wrapper, "grad_acc_dtype", torch.float32) != torch.float32:
        return (
            "BF16_Optimizer copies all gradients to fp32 at once if they accumulate in bf16. Leave "
            "out the call, or accumulate in fp32"
        )
    if getattr(wrapper, "torch_autocast_gradscaler", None):
        return (
            "the gradient scaler of torch_autocast with fp16 steps each group itself. Leave out "
            "the call, or use bf16"
        )
    if {"step", "scaled_global_norm"} & vars(wrapper).keys():
        return (
            "engine.optimizer.step was replaced, and lean_step would replace it again. Call "
            "lean_step first"
        )
    return None


def tile_of(engine: Any) -> int | None:
    """Bytes of the tile of an engine that steps lean; None for another one."""
    known: ZeroStep | Bf16Step | None = getattr(engine.optimizer, _LEAN, None)
    return None if known is None else known.tile_bytes


class ZeroStep:
    """``step`` and ``scaled_global_norm`` of a ZeRO-1/2 optimizer.

    Attributes:
        tile_bytes: what a tile takes.
        most: its elements.
        gathering: of the weights.
    """

    tile_bytes: int
    most: int
    gathering: Gathering

    def __init__(self, zero: Any) -> None:
        self.zero, self._warned = zero, False
        zero.step = self.step
        zero.scaled_global_norm = self.scaled_global_norm

    @staticmethod
    def gathers(zero: Any, tile_bytes: int) -> Gathering:
        """The gradients are gone by then."""
        released = zero.gradient_accumulation_dtype.itemsize
        owners = zero.real_dp_process_group
        return Gathering(zero.bit16_groups_flat, owners, tile_bytes, released)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As DeepSpeed's, but that groups are stepped in tiles, or several at once."""
        from deepspeed.runtime.zero import stage_1_and_2 as deepspeed

        zero = self.zero
        zero.micro_step_id = deepspeed.INITIAL_MICRO_STEP_ID
        if not zero.compute_grad_norm:
            zero._global_grad_norm = None
        zero.overflow, norm = False, None
        if zero.check_grad_overflow:
            zero.check_overflow(partition_gradients=zero.partition_gradients)
        if zero.compute_grad_norm and not zero.overflow:
            norm = zero.scaled_global_norm()
            checks = zero.dtype != torch.bfloat16 or zero.check_grad_overflow
            zero.overflow = checks and deepspeed.is_invalid_grad_norm(norm)
        scale_before = zero.loss_scale
        zero._update_scale(zero.overflow)
        timers = deepspeed.OPTIMIZER_TIMERS
        if zero.overflow:
            if zero.compute_grad_norm:
                zero._global_grad_norm = float("inf")
            zero.zero_grad(set_to_none=True)
            for index in range(len(zero.bit16_groups)):
                self._release(index)
            for timer in timers:
                zero.timers(timer).start()
                zero.timers(timer).stop()
            return
        if norm is not None:
            zero._global_grad_norm = norm / scale_before
        zero.timers(deepspeed.OPTIMIZER_GRADIENTS_TIMER).start()
        scale = self._scale(norm)
        zero.timers(deepspeed.OPTIMIZER_GRADIENTS_TIMER).stop()
        zero.timers(deepspeed.OPTIMIZER_STEP_TIMER).start()
        self._step_groups(scale)
        zero._lazy_init_hp_params_optimizer_state()
        zero.timers(deepspeed.OPTIMIZER_STEP_TIMER).stop()
        zero.timers(deepspeed.OPTIMIZER_ALLGATHER_TIMER).start()
        self.gathering.run()
        zero.timers(deepspeed.OPTIMIZER_ALLGATHER_TIMER).stop()
        for index in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(index)
        zero.timers.log(timers)

    def _scale(self, norm: torch.Tensor | None) -> torch.Tensor | float | None:
        """The factor of all gradients; None for 1."""
        zero = self.zero
        if zero.clip_grad == 0.0:
            return None if zero.loss_scale == 1.0 else 1.0 / zero.loss_scale
        one = torch.ones((), device=zero.device)
        zero.unscale_and_clip_grads([one], norm)
        return one

    @torch.no_grad()
    def _step_groups(self, scale: torch.Tensor | float | None) -> None:
        optimizer, masters = self.zero.optimizer, self.zero.single_partition_of_fp32_groups
        sizes = [master.numel() for master in masters]
        # A hook that reads gradients gets them as without tiles: one group after another.
        most = 0 if (whole := tiles.need_gradients(optimizer)) else self.most
        if whole and not self._warned:
            self._warned = True
            warn(
                "a hook of the optimizer's step may read gradients, so lean_step steps each group "
                "whole. If it reads none, make it a method of an object with "
                "needs_gradients = False.",
                CostlyGroupsWarning,
            )
        for batch in tiles.batches(sizes, most):
            groups = [optimizer.param_groups[index] for index in batch]
            if sizes[batch[0]] > most and not whole:
                self._step_in_tiles(batch[0], groups[0], scale)
            else:
                for index in batch:
                    masters[index].grad = self._gradient(index, scale)(0, sizes[index])
                    self._release(index)
                with tiles.only(optimizer, groups):
                    optimizer.step()
            for index in batch:
                masters[index].grad = None
                self._write(index)

    def _step_in_tiles(
        self, index: int, group: tiles.Group, scale: torch.Tensor | float | None
    ) -> None:
        optimizer = self.zero.optimizer
        master = self.zero.single_partition_of_fp32_groups[index]
        # Shows hooks that there is a gradient, without the memory of one.
        master.grad = master.new_zeros(()).expand(master.shape)
        try:
            with tiles.only(optimizer, [group]), tiles.around_hooks(optimizer):
                if master.grad is not None:  # a hook removes it to skip a frozen group
                    gradient = self._gradient(index, scale)
                    tiles.step_in_tiles(optimizer, group, gradient, self.most)
        finally:
            master.grad = None
        self._release(index)

    def _gradient(self, index: int, scale: torch.Tensor | float | None) -> tiles.Gradient:
        flat = self.zero._get_preflattened_grad_partition(index)
        dtype = self.zero.single_partition_of_fp32_groups[index].dtype

        def gradient(start: int, end: int) -> torch.Tensor:
            tile: torch.Tensor = flat[start:end].to(dtype)
            return tile if scale is None else tile.mul_(scale)

        return gradient

    def _release(self, index: int) -> None:
        """Release the gradients of a group."""
        zero = self.zero
        zero.free_grad_in_param_list(zero.bit16_groups[index])
        zero._release_preflattened_grad_buffers(index)
        zero.averaged_gradients[index] = None
        zero.all_grad_tensors[index] = None

    def _write(self, index: int) -> None:
        """Write a group's master weights into this rank's part of its weights."""
        zero = self.zero
        rank = torch.distributed.get_rank(zero.real_dp_process_group[index])
        own = zero.parallel_partitioned_bit16_groups[index][rank]
        own.data.copy_(zero.single_partition_of_fp32_groups[index].data)

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        """The norm of all gradients: as DeepSpeed's, with one all-reduce per process group.

        The last bit can differ: squares are added for each tile instead of each parameter, and
        ranks in another order.
        """
        from deepspeed import comm
        from deepspeed.runtime import utils

        zero = self.zero
        most, differ = groups_of_stages(zero)
        squares = torch.zeros(most, device=zero.device)
        for index in range(len(zero.bit16_groups)):
            squares[index] = self._square(index)
        comm.all_reduce(squares, group=zero.dp_process_group)
        zero._model_parallel_all_reduce(tensor=squares, op=comm.ReduceOp.SUM)
        norms = squares.pow(0.5)
        utils.mask_nan_or_inf_with_val_inplace(norms, device=zero.device)
        if zero.has_moe_layers:
            self._average(norms)
        norm = utils.combine_grad_norm_groups(list(norms), norm_type=norm_type)
        return same_on_all_stages(zero, norm) if differ else norm

    def _square(self, index: int) -> torch.Tensor:
        """The sum of the squares of this rank's gradients of a group that the norm counts."""
        from deepspeed.runtime.zero import stage_1_and_2 as deepspeed

        dtype = deepspeed.get_norm_dtype()
        norms = [
            torch.linalg.vector_norm(gradient[start:end].to(dtype))
            for gradient in self._counted(index)
            for start, end in tiles.slices(gradient.numel(), self.most)
        ]
        none = torch.zeros((), dtype=dtype, device=self.zero.device)
        return torch.stack([none, *norms]).square().sum().float()

    def _counted(self, index: int) -> list[torch.Tensor]:
        """Flat gradients of a group that the norm counts on this rank: all at once, or some."""
        from deepspeed.runtime.zero import stage_1_and_2 as deepspeed

        zero, params = self.zero, self.zero.params_in_partition[index]
        counts = [
            not getattr(param, "ds_pipe_replicated", False)
            and (zero.model_parallel_rank == 0 or deepspeed.is_model_parallel_parameter(param))
            for param in params
        ]
        if all(counts):
            return [zero._get_preflattened_grad_partition(index)]
        pieces = zero.averaged_gradients[index]
        own = (one for one in pieces if not getattr(one, "_zero_padding", False))
        pairs = zip(own, counts, strict=False)  # the last piece may be padding without a mark
        return [gradient.detach().view(-1) for gradient, counted in pairs if counted]

    def _average(self, norms: torch.Tensor) -> None:
        """Average the norms of expert groups over the ranks that share them, as DeepSpeed does."""
        from deepspeed import comm

        zero = self.zero
        sharing: dict[Any, list[int]] = {}
        for index, is_moe in enumerate(zero.is_moe_param_group):
            if is_moe:
                sharing.setdefault(zero.real_dp_process_group[index], []).append(index)
        for owner, indices in sharing.items():
            averaged = norms[indices] * 1.0 / torch.distributed.get_world_size(owner)
            comm.all_reduce(averaged, group=owner)
            norms[indices] = averaged
