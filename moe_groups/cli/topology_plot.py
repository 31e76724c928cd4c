"""Draw the groups of ranks: one map of all ranks for each kind of group."""

from typing import TYPE_CHECKING

from moe_groups.cli.plan_plot import check_plot
from moe_groups.cli.topology import headline
from moe_groups.errors import InvalidArgumentError
from moe_groups.topology import GroupKind, Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS: tuple[tuple[GroupKind, str], ...] = (
    ("data", "share dense parameters\n(data parallel)"),
    ("expert", "exchange tokens\n(expert parallel)"),
    ("expert_data", "share experts\n(expert data parallel)"),
)
# Paul Tol's scheme "light": light enough for black letters, and distinct to readers who
# cannot see red or green.
_COLORS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#DDDDDD")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++")
_MOST_RANKS = 128
_CELL = 0.6  # inches
_GAP = 0.35  # between stages, in cells


def check_picture(path: str, topology: Topology) -> None:
    """Raise InvalidArgumentError if no picture can be written to ``path``."""
    check_plot(path, ".png")
    if topology.world_size > _MOST_RANKS:
        raise InvalidArgumentError(
            f"--plot draws up to {_MOST_RANKS} ranks, not {topology.world_size}: --json has all "
            "groups, and a smaller world of the same sizes looks the same."
        )


def write_picture(topology: Topology, path: str) -> None:
    """Write the picture as PNG."""
    draw(topology).savefig(path, format="png", dpi=130, bbox_inches="tight")


def draw(topology: Topology) -> "Figure":
    """The maps: stages below each other; rows are tensor ranks, columns are data ranks."""
    from matplotlib.figure import Figure

    wide = topology.data_parallel_size
    high = topology.pp_size * (topology.tp_size + _GAP)
    beside = wide <= max(4, high)
    width, height = wide * _CELL + 0.9, high * _CELL + (0.85 if beside else 0.8)
    title = headline(topology).split("; ")
    above = 0.15 + 0.2 * len(title)
    size = (3 * width, height + above) if beside else (width, 3 * height + above)
    figure = Figure(figsize=(max(size[0], 5.5), size[1]), layout="constrained")
    panels = figure.subplots(*((1, 3) if beside else (3, 1)), squeeze=False).flat
    for axes, (kind, name) in zip(panels, _PANELS, strict=True):
        _map(axes, topology, kind)
        axes.set_title(name if beside else name.replace("\n", " "), fontsize=10)
    figure.suptitle("\n".join(title), fontsize=10, fontweight="bold")
    return figure


def _map(axes: "Axes", topology: Topology, kind: GroupKind) -> None:
    """Draw one cell for each rank: its number, and the letter of its group."""
    for index, ranks in enumerate(topology.groups(kind)):
        for rank in ranks:
            _cell(axes, _place(topology, rank), str(rank), index)
    _label(axes, topology)


def _place(topology: Topology, rank: int) -> tuple[float, float]:
    below = topology.stage(rank) * (topology.tp_size + _GAP) + topology.tensor_rank(rank)
    return float(topology.data_rank(rank)), below


def _cell(axes: "Axes", corner: tuple[float, float], rank: str, group: int) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x, y = corner
    color = _COLORS[group % len(_COLORS)]
    hatch = _HATCHES[group // len(_COLORS) % len(_HATCHES)]
    cell = Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, linewidth=0, facecolor=color, hatch=hatch)
    cell.set_edgecolor("#00000038")  # colour of the hatching
    axes.add_patch(cell)
    texts = (
        axes.text(x + 0.5, y + 0.58, letters(group), ha="center", va="center", fontsize=13),
        axes.text(x + 0.1, y + 0.12, rank, ha="left", va="top", fontsize=7),
    )
    for text in texts if hatch else ():
        text.set_path_effects([withStroke(linewidth=5, foreground=color)])


def letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def _label(axes: "Axes", topology: Topology) -> None:
    """Label the axes without lines: data ranks below, stages and tensor ranks to the left."""
    dp, tp, pp = topology.data_parallel_size, topology.tp_size, topology.pp_size
    axes.set_xlim(-0.02, dp + 0.02)
    axes.set_ylim(pp * (tp + _GAP) - _GAP + 0.02, -0.02)
    axes.set_aspect("equal")
    axes.set_xticks([place + 0.5 for place in range(dp)], [str(place) for place in range(dp)])
    axes.set_xlabel("data-parallel rank", fontsize=8)
    rows = [(stage, slot) for stage in range(pp) for slot in range(tp)]
    names = [
        ", ".join([f"stage {stage}"] * (pp > 1) + [f"tp {slot}"] * (tp > 1)) for stage, slot in rows
    ]
    axes.set_yticks([stage * (tp + _GAP) + slot + 0.5 for stage, slot in rows], names)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
