"""Parameters to keys, keys to groups, names and tiles: pure, without DeepSpeed."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.groups.description import GroupRow as GroupRow, GroupTable as GroupTable
    from moe_groups.groups.muon import is_hidden_matrix as is_hidden_matrix
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "description": ("GroupRow", "GroupTable"),
            "muon": ("is_hidden_matrix",),
        },
    )
