"""Parameters and buffers of a model, and parts of them, which ZeRO-3 may have partitioned."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_groups.errors import InvalidArgumentError
from moe_groups.tags import shape_of


@dataclass(frozen=True)
class Part:
    """A tensor of a model, or consecutive elements of it.

    Attributes:
        tensor: the parameter or buffer; a placeholder if ZeRO-3 has partitioned it.
        first: number of the part's first element in it.
        shape: of the part.
    """

    tensor: torch.Tensor
    first: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> "Part":
        return cls(tensor, 0, tuple(shape_of(tensor)))

    @classmethod
    def rows(cls, tensor: torch.Tensor, number: int, rows: slice = slice(None)) -> "Part":
        """Rows of the matrix of one expert, where a tensor has those of all experts."""
        _, height, width = shape_of(tensor)
        start, stop, _ = rows.indices(height)
        return cls(tensor, (number * height + start) * width, (stop - start, width))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.tensor.element_size()

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The part of the values of the whole tensor; a view of them."""
        if tuple(values.shape) == self.shape:
            return values
        flat = values.view(-1)[self.first : self.first + self.numel]
        return flat.view(self.shape)

    def fill(self, values: torch.Tensor) -> int:
        """Copy what this rank has of the part from its values.

        Returns:
            How many bytes of the values were read.
        """
        tensor: Any = self.tensor
        if not hasattr(tensor, "ds_id"):
            self.of(tensor.detach()).copy_(values)
            return values.nbytes
        partition = tensor.ds_tensor
        size = partition.ds_numel
        begin = torch.distributed.get_rank(tensor.ds_process_group) * size
        start = max(begin, self.first)
        stop = min(begin + size, self.first + self.numel)
        if start >= stop:
            return 0
        own = values.reshape(-1)[start - self.first : stop - self.first]
        partition.detach()[start - begin : stop - begin].copy_(own)
        return own.nbytes


def is_partitioned(model: nn.Module) -> bool:
    """Has ZeRO-3 partitioned the parameters, with placeholders in the model?"""
    return any(hasattr(param, "ds_id") for param in model.parameters())


def check_partitions(model: nn.Module) -> None:
    """Refuse partitions of ZeRO-3 that cannot be written where they are.

    Raises:
        InvalidArgumentError: one is on NVMe, quantized, or of a part of the ranks (MiCS).
    """
    for name, param in model.named_parameters():
        partition = getattr(param, "ds_tensor", None)
        if partition is None:
            continue
        found = {
            'on NVMe ("offload_param")': partition.final_location == "nvme",
            'quantized ("zero_quantized_nontrainable_weights")': hasattr(
                partition, "ds_quant_scale"
            ),
            'distributed over a part of the ranks ("mics_shard_size")': hasattr(param, "comm"),
        }
        if what := next((what for what, is_so in found.items() if is_so), None):
            raise InvalidArgumentError(
                f"load_experts cannot write {name}, which ZeRO-3 has {what}: load without this "
                "setting, or with from_pretrained before deepspeed.initialize."
            )


@contextlib.contextmanager
def ready_to_gather(engine: Any) -> Iterator[None]:
    """Between these, parameters of ZeRO-3 may be gathered, as where DeepSpeed saves them.

    And partitions may be changed: no parameter is gathered at first, and afterwards the small ones
    that always are have been gathered again.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "checkpoint_event_prologue"):
        if hasattr(optimizer, "partition_all_parameters"):  # an engine that does not train
            optimizer.partition_all_parameters()
        yield
        return
    optimizer.checkpoint_event_prologue()
    yield
    optimizer.checkpoint_event_epilogue()


@contextlib.contextmanager
def gathered(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of a tensor; of a parameter of ZeRO-3 from all ranks, which call it together."""
    if not hasattr(tensor, "ds_id"):
        yield tensor.detach()
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        yield tensor.detach()


def whole_values(tensor: torch.Tensor) -> torch.Tensor:
    """The same in CPU memory, where they stay."""
    with gathered(tensor) as values:
        return values.to("cpu", copy=hasattr(tensor, "ds_id"))
