"""Hugging Face checkpoints to and from expert-parallel ranks."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.weights.load import LoadedExperts as LoadedExperts
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "load": ("LoadedExperts",),
        },
    )
