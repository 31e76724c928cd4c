"""Draws ``packages.svg``, the packages and their order, from the import contract.

    python docs/assets/draw_packages.py

The contract is "one-way house" in ``pyproject.toml``: its layers, the highest first. Every word
stands in a filled box, so that it can be read on a light page and on a dark one.
"""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("packages.svg")
WIDTH, ROW, GAP, INSET = 400, 26, 6, 12
PACKAGE, PART, FRAME, ARROW = "#c5cae9", "#e8eaf6", "#7986cb", "#9e9e9e"


def read_layers() -> list[list[str]]:
    """The modules of each layer, highest first, without the name of the root package."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [layers] = [
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["name"] == "one-way house"
    ]
    return [
        [module.strip().removeprefix("moe_groups.") for module in layer.split("|")]
        for layer in layers
    ]


def draw(layers: list[list[str]]) -> str:
    """The picture: a row a layer, and a frame around the layers inside one package."""
    shapes: list[str] = []
    top = GAP
    for package, layers_inside in groupby(layers, key=_package):
        rows = list(layers_inside)
        if package:
            top = _arrow(shapes, top)
            height = (len(rows) + 1) * ROW + len(rows) * GAP
            shapes.append(_box(GAP, top, WIDTH - 2 * GAP, height, PACKAGE))
            shapes.append(_text(WIDTH / 2, top, package, bold=True))
            top += ROW
            for row in rows:
                names = [name.removeprefix(f"{package}.") for name in row]
                top = _row(shapes, names, top, INSET + GAP, PART, bold=False) + GAP
        else:
            for row in rows:
                top = _row(shapes, row, _arrow(shapes, top), GAP, PACKAGE)
    height = top + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" font-size="13" '
            'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">',
            "<title>The packages of moe-groups: each imports from those below it only</title>",
            *shapes,
            "</svg>\n",
        ]
    )


def _package(layer: list[str]) -> str:
    """The package whose parts the layer holds; "" for a layer of whole packages."""
    package, inside, _ = layer[0].partition(".")
    return package if inside else ""


def _row(
    shapes: list[str], names: list[str], top: int, margin: int, fill: str, bold: bool = True
) -> int:
    """Boxes side by side, as wide as their names ask for; the top of what comes next."""
    free = WIDTH - 2 * margin - GAP * (len(names) - 1)
    letters = sum(len(name) + 2 for name in names)
    left = float(margin)
    for name in names:
        width = free * (len(name) + 2) / letters
        shapes.append(_box(left, top, width, ROW, fill))
        shapes.append(_text(left + width / 2, top, name, bold))
        left += width + GAP
    return top + ROW


def _box(left: float, top: int, width: float, height: int, fill: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" rx="4" '
        f'fill="{fill}" stroke="{FRAME}"/>'
    )


def _text(middle: float, top: int, name: str, bold: bool) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{middle:.1f}" y="{top + 18}" text-anchor="middle" fill="#1a237e"{weight}>'
        f"{name}</text>"
    )


def _arrow(shapes: list[str], top: int) -> int:
    """Down from one row to the next, if there is one above; the top of the next."""
    if not shapes:
        return top
    middle, tip = WIDTH // 2, top + 2 * GAP - 1
    shapes.append(f'<path d="M{middle - 6} {top + 2} h12 L{middle} {tip} z" fill="{ARROW}"/>')
    return top + 2 * GAP


if __name__ == "__main__":
    PICTURE.write_text(draw(read_layers()))
