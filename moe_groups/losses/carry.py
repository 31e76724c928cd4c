"""Carry the load-balancing loss through a PipelineModule, as a second activation.

Every layer of the pipeline is wrapped in :class:`CarryLoss` and passes on ``(hidden, aux_loss)``;
the loss function of the last stage is wrapped in :class:`CarriedLoss` and adds the sum. Stages
exchange one more number, and the reported loss includes all losses.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from moe_groups._common.arguments import NotNegative, check, checked
from moe_groups.errors import InvalidArgumentError

Carried: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Hidden states, and the sum of the losses so far: fp32, of one element."""


@checked
class CarryLoss(nn.Module):
    """A pipeline layer that adds its loss to the sum of its input and passes on both.

    Args:
        block: the layer, or its class, which is then called with the other arguments: so
            ``LayerSpec(CarryLoss, Block, 64)`` builds the block on its own stage only. It
            returns hidden states, or ``(hidden states, loss, ...)`` as ``MoE`` does; further
            values are dropped.

    Shape:
        input: hidden states (of the first layer, which begins a sum), or :data:`Carried`.
        output: :data:`Carried`.

    Example:
        >>> layers = [LayerSpec(CarryLoss, Block, 64) for _ in range(8)]       # doctest: +SKIP
        >>> loss_fn = CarriedLoss(cross_entropy, coefficient=0.01)             # doctest: +SKIP
        >>> model = PipelineModule(layers, num_stages=2, loss_fn=loss_fn)      # doctest: +SKIP
    """

    def __init__(self, block: nn.Module | Callable[..., nn.Module], *args: Any, **kwargs: Any):
        super().__init__()
        made = block if isinstance(block, nn.Module) else block(*args, **kwargs)
        check("block(...)", made, nn.Module)
        self.block = made

    def forward(self, inputs: torch.Tensor | Carried) -> Carried:
        hidden, total = (inputs, None) if isinstance(inputs, torch.Tensor) else self._read(inputs)
        result = self.block(hidden)
        made, loss = (result, None) if isinstance(result, torch.Tensor) else self._made(result)
        if total is None:
            # PipelineEngine needs every float that is sent to be part of the graph.
            total = made.flatten()[:0].sum(dtype=torch.float32)
        return made, total if loss is None else total + loss.float().reshape(())

    def _read(self, inputs: Any) -> Carried:
        if len(inputs) == 2 and inputs[1].dtype == torch.float32 and inputs[1].numel() == 1:
            return inputs[0], inputs[1].reshape(())
        raise InvalidArgumentError(
            f"CarryLoss around {type(self.block).__name__} got {len(inputs)} values, not "
            "hidden states and a sum of losses (fp32, one element): wrap every layer of the "
            "pipeline; the first gets one tensor."
        )

    def _made(self, result: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(result) < 2:
            return result[0], None
        loss = result[1]
        if loss is None or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            return result[0], loss
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss)
        raise InvalidArgumentError(
            f"CarryLoss: the second value that {type(self.block).__name__} returned is no loss of "
            f"one element, but {what}: return hidden states, or hidden states and the loss."
        )


@checked
class CarriedLoss:
    """A loss function for :class:`CarryLoss` layers: the result of ``loss_fn`` plus their sum.

    Args:
        loss_fn: takes the last layer's hidden states and the labels.
        coefficient: weight of the sum of all layers' losses.
    """

    def __init__(
        self, loss_fn: Callable[..., torch.Tensor], coefficient: NotNegative = 0.01
    ) -> None:
        self.loss_fn, self.coefficient = loss_fn, coefficient

    def __call__(self, outputs: Carried, labels: Any) -> torch.Tensor:
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise InvalidArgumentError(
                "CarriedLoss: the last layer returned no (hidden states, loss): wrap every layer "
                "of the pipeline in CarryLoss."
            )
        hidden, total = outputs
        loss = self.loss_fn(hidden, labels)
        check("loss_fn(...)", loss, torch.Tensor)
        return loss + self.coefficient * total


def carrying_problem(
    layers: Sequence[Any], loss_fn: Any, partitioned: bool, recomputed: bool, where: str
) -> str | None:
    """Why this stage would drop a carried loss, and what to do; None if it does not.

    Args:
        layers: the stage's layers in order; functions among them are not checked.
        loss_fn: the pipeline's.
        partitioned: does the engine cut activations over tensor-parallel ranks?
        recomputed: are layers recomputed by DeepSpeed's own activation checkpointing?
        where: what to call the stage.
    """
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Module) and not isinstance(layer, CarryLoss):
            return (
                f"layer {index} of {where} ({type(layer).__name__}) is not wrapped in CarryLoss, "
                "and others of the pipeline are: wrap every layer, as LayerSpec(CarryLoss, Block, "
                "...)."
            )
    if loss_fn is not None and not isinstance(loss_fn, CarriedLoss):
        return (
            f"the layers of {where} carry a loss, but the pipeline's loss_fn would drop it: use "
            "loss_fn=CarriedLoss(loss_fn, coefficient)."
        )
    if partitioned:
        return (
            f"{where} carries a loss as a second activation, which PipelineEngine cannot send "
            'with partitioned activations: set "pipeline": {"pipe_partitioned": false, '
            '"grad_partitioned": false} in the config, or use attach_loss.'
        )
    if recomputed:
        return (
            f"{where} carries a loss as a second activation, through which PipelineEngine goes "
            "backward a second time, and DeepSpeed's activation checkpointing allows one: give "
            "PipelineModule activation_checkpoint_func=functools.partial(torch.utils.checkpoint."
            "checkpoint, use_reentrant=False) or moe_groups.checkpoint_activations, or use "
            "attach_loss."
        )
    return None
