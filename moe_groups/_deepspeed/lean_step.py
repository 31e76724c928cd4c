"""The step of ZeRO-1/2 and BF16_Optimizer in tiles, with few collectives for any groups.

Follows ``DeepSpeedZeroOptimizer.step`` (``runtime/zero/stage_1_and_2.py``) and
``BF16_Optimizer.step`` (``runtime/bf16_optimizer.py``). The methods are replaced on one optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_groups._deepspeed import tiles
from moe_groups._deepspeed.exact_partitions import check_can_be_exact, keep_exact_partitions
from moe_groups._deepspeed.gathering import Gathering
from moe_groups._deepspeed.norms import groups_of_stages, same_on_all_stages
from moe_groups.errors import InvalidArgumentError

_LEAN = "_moe_groups_lean_step"


def step_lean(engine: Any, tile_bytes: int) -> None:
    """Make the engine's wrapper step in tiles that take at most ``tile_bytes``.

    Raises:
        InvalidArgumentError: this engine does not support it; it is not changed then.
        UnsupportedDeepSpeedError: this DeepSpeed lacks exact partitions.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    most, wrapper = tiles.elements_of(tile_bytes), engine.optimizer
    known: ZeroStep | Bf16Step | None = getattr(wrapper, _LEAN, None)
    if known is None:
        if isinstance(wrapper, BF16_Optimizer):
            if any(group.get("use_muon") for group in wrapper.param_groups):
                raise InvalidArgumentError(
                    "lean_step cannot be used on this engine: Muon steps whole matrices. Leave out "
                    "the call, or step all parameters with another optimizer."
                )
            tiles.check_elementwise(wrapper.optimizer)
            known = Bf16Step(wrapper)
        else:
            check_can_be_exact(engine, "lean_step")
            if wrapper.torch_autocast_gradscaler:
                raise InvalidArgumentError(
                    "lean_step cannot be used on this engine: the gradient scaler of "
                    "torch_autocast with fp16 steps each group itself. Leave out the call, or use "
                    "bf16."
                )
            tiles.check_elementwise(wrapper.optimizer)
            keep_exact_partitions(engine, "lean_step")
            known = ZeroStep(wrapper)
        setattr(wrapper, _LEAN, known)
    known.most, known.tile_bytes = most, tile_bytes
    known.gathering = known.gathers(tile_bytes)


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
        self.zero = zero
        zero.step = self.step
        zero.scaled_global_norm = self.scaled_global_norm

    def gathers(self, most_bytes: int) -> Gathering:
        return Gathering(self.zero.bit16_groups_flat, self.zero.real_dp_process_group, most_bytes)

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
        # Tells hooks that there is a gradient, without the memory of one.
        master.grad = master.new_zeros(()).expand(master.shape)
        with tiles.only(optimizer, [group]), tiles.around_hooks(optimizer):
            if master.grad is not None:  # a hook removes it to skip a frozen group
                master.grad = None
                tiles.step_in_tiles(optimizer, group, self._gradient(index, scale), self.most)
        self._release(index)

    def _flat(self, index: int) -> torch.Tensor:
        """The exact gradients of a group's partition."""
        flat: torch.Tensor = self.zero._get_preflattened_grad_partition(index)
        return flat

    def _gradient(self, index: int, scale: torch.Tensor | float | None) -> tiles.Gradient:
        flat, dtype = self._flat(index), self.zero.single_partition_of_fp32_groups[index].dtype

        def gradient(start: int, end: int) -> torch.Tensor:
            tile = flat[start:end].to(dtype)
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
            return [self._flat(index)]
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


class Bf16Step:
    """What is lean in the step of ``BF16_Optimizer``: its optimizer's, and the gathering.

    Its fp32 gradients stay, and all groups have one all-reduce per process group already.
    """

    tile_bytes: int
    most: int
    gathering: Gathering

    def __init__(self, bf16: Any) -> None:
        self.bf16, self._step = bf16, bf16.step
        bf16.step = self.step
        bf16.update_lp_params = self.update_lp_params

    def gathers(self, most_bytes: int) -> Gathering:
        return Gathering(self.bf16.bf16_groups_flat, self.bf16.real_dp_process_group, most_bytes)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """DeepSpeed's, with an optimizer that steps in tiles."""
        optimizer = self.bf16.optimizer
        self.bf16.optimizer = _Tiled(optimizer, self.most)
        try:
            self._step(closure)
        finally:
            self.bf16.optimizer = optimizer

    def update_lp_params(self) -> None:
        """As DeepSpeed's, with few collectives."""
        bf16 = self.bf16
        for index, master in enumerate(bf16.fp32_groups_flat_partition):
            rank = torch.distributed.get_rank(bf16.real_dp_process_group[index])
            bf16.bf16_partitioned_groups[index][rank].data.copy_(master.data)
        self.gathering.run()


class _Tiled:
    """Stands for an optimizer during one step: all but ``step`` is the optimizer's own."""

    def __init__(self, optimizer: torch.optim.Optimizer, most: int) -> None:
        self._optimizer, self._most = optimizer, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        optimizer, most = self._optimizer, self._most
        with tiles.around_hooks(optimizer):
            large = [g for g in optimizer.param_groups if g["params"][0].numel() > most]
            small = [g for g in optimizer.param_groups if g["params"][0].numel() <= most]
            with tiles.only(optimizer, small):
                optimizer.step()
            for group in large:
                gradient = group["params"][0].grad
                if gradient is not None:  # a hook removes that of a frozen group
                    tiles.step_in_tiles(optimizer, group, _slices_of(gradient), most)


def _slices_of(gradient: torch.Tensor) -> tiles.Gradient:
    return lambda start, end: gradient[start:end]
