"""The pages cannot rot: their code runs, and what they show is what comes out.

An HTML comment above a code block says what is checked:

    <!-- run -->                the block runs; the blocks of a page share one namespace
    <!-- raises -->             it raises; the text block below it is the error
    <!-- prints -->             above a text block: what the code before it printed
    <!-- run on 2 ranks -->     as "run", in two processes, after the page's "run" blocks;
    <!-- raises on 2 ranks -->  and as "raises"

A comment that holds more than the directive is code that runs and is not shown. White
space does not count when text is compared. Other Python blocks must compile.
"""

import contextlib
import io
import json
import re
import runpy
from dataclasses import dataclass
from typing import Any

import pytest

import moe_groups
from moe_groups import errors
from tests.support import ROOT
from tests.support.ranks import run_on_ranks

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]

_PIECE = re.compile(
    r"^<!-- (?P<kind>run|raises|prints)(?P<ranks> on 2 ranks)?(?:\n(?P<hidden>.*?))?\s*-->$"
    r"|^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """Code of a page.

    Attributes:
        kind: "run", "raises", or "" for code that is not run.
        on_ranks: it runs on two ranks only.
        line: where it is on the page.
        shown: what the page says that it prints or raises, and None if it does not say.
    """

    kind: str
    on_ranks: bool
    code: str
    line: int
    shown: str | None = None


def read_page(page: str) -> list[Block]:
    source = (ROOT / page).read_text()
    blocks: list[Block] = []
    kind, on_ranks = "", False
    for piece in _PIECE.finditer(source):
        line = source.count("\n", 0, piece.start()) + 1
        if piece["kind"]:
            assert not kind, f"{page}:{line}: no code block follows the directive {kind!r}"
            kind, on_ranks = piece["kind"], bool(piece["ranks"])
            if piece["hidden"] is None:
                continue
            blocks.append(Block(kind, on_ranks, piece["hidden"], line))
        elif kind == "prints":
            assert blocks, f"{page}:{line}: no code before what it prints"
            assert blocks[-1].kind == "run", f"{page}:{line}: the code before it does not run"
            blocks[-1].shown = piece["body"]
        elif piece["language"] == "python":
            blocks.append(Block(kind, on_ranks, piece["body"], line))
        elif piece["language"] == "text" and blocks and blocks[-1].kind == "raises":
            blocks[-1].shown = blocks[-1].shown or piece["body"]
        kind, on_ranks = "", False
    for block in blocks:
        assert block.kind != "raises" or block.shown, f"{page}:{block.line} shows no error"
    return blocks


def run_page(page: str, ranks: bool = False) -> None:
    """Run the blocks of ``page``; what is shown is compared where the block belongs.

    On ranks the others run too, because those on ranks build on them.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_page(page):
        belongs = block.on_ranks == ranks
        if not block.kind or (block.on_ranks and not ranks):
            continue
        if block.kind == "raises" and not belongs:
            continue
        result = _execute(block, namespace, page)
        if belongs and block.shown is not None:
            _compare(block.shown, result, f"{page}:{block.line}")


def _execute(block: Block, namespace: dict[str, Any], page: str) -> str:
    """What the block prints, or the error that it raises if it shall."""
    # Leading newlines, so that a traceback shows the line of the page.
    code = compile("\n" * block.line + block.code, str(ROOT / page), "exec")
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
    except Exception as error:
        if block.kind == "raises":
            return f"{type(error).__name__}: {error}"
        raise
    assert block.kind == "run", f"{page}:{block.line} raises nothing"
    return output.getvalue()


def _compare(shown: str, actual: str, where: str) -> None:
    if shown.split() != actual.split():
        pytest.fail(f"{where} shows\n{shown}\nbut it is\n{actual}")


def needs_ranks(page: str) -> bool:
    return any(block.on_ranks for block in read_page(page))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page: str) -> None:
    import deepspeed  # noqa: F401  (what it prints when imported is not the page's)

    run_page(page)


@pytest.mark.parametrize("page", [page for page in PAGES if needs_ranks(page)])
def test_blocks_of_a_page_run_on_two_ranks(page: str) -> None:
    run_on_ranks(2, run_page, page, ranks=True)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str) -> None:
    for block in read_page(page):
        compile(block.code, f"{page}:{block.line}", "exec")


def test_no_page_has_marks_of_a_merge() -> None:
    for page in [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]:
        found = re.search(r"^(<{7}|>{7}) .*$", (ROOT / page).read_text(), re.MULTILINE)
        assert found is None, f"{page}: {found}"


@pytest.mark.parametrize("page", PAGES)
def test_a_paragraph_in_a_list_is_indented_as_the_site_needs_it(page: str) -> None:
    """By 4 spaces; with fewer the list ends there, and the items behind are no list any more."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert re.findall(r"\n\n {1,3}\S.*", text) == []


def test_error_page_has_every_kind() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    headings = re.findall(r"^## `(\w+)`", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(kinds - {"MoEGroupsError"})


def test_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    documented = re.findall(r"^::: moe_groups\.(?:\w+\.)*(\w+)$", page, re.MULTILINE)
    assert set(moe_groups.__all__) <= set(documented)


def test_picture_of_the_packages_is_that_of_the_import_contract() -> None:
    """If not: ``python docs/assets/draw_packages.py``."""
    script = runpy.run_path(str(ROOT / "docs/assets/draw_packages.py"))
    assert script["PICTURE"].read_text() == script["draw"](script["read_layers"]())


def test_page_on_the_packages_names_each() -> None:
    packages = {f"{p.parent.name}/" for p in (ROOT / "moe_groups").glob("*/__init__.py")}
    files = {p.name for p in (ROOT / "moe_groups").glob("*.py")} - {"__init__.py", "_version.py"}
    page = (ROOT / "docs/how-it-is-built.md").read_text()
    named = set(re.findall(r"`(?:\w+/)?(\w+(?:/|\.py))`", page))
    assert packages | files <= named


def test_files_named_for_contributors_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:moe_groups|tests|docs|benchmarks)/[\w/.-]*)`", page))
    links = set(re.findall(r"\]\(([\w/.-]+)\)", page))
    assert len(named) > 20
    assert [path for path in sorted(named | links) if not (ROOT / path).exists()] == []


def test_pages_say_whether_there_is_a_run_on_a_gpu() -> None:
    """They say that there is none, until ``benchmarks/cuda_tables.py`` writes its results."""
    missing = not (ROOT / "benchmarks/results/cuda.json").exists()
    for page, words in (
        ("benchmarks/README.md", "No run on a GPU has been committed yet"),
        ("docs/measuring.md", "no run\non a GPU has been published yet"),
    ):
        assert (words in (ROOT / page).read_text()) == missing, page


def test_links_of_the_readme_lead_to_files_also_on_pypi() -> None:
    page = (ROOT / "README.md").read_text()
    own = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert len(own) > 20
    assert [link for link in own if not (ROOT / link.partition("#")[0]).exists()] == []
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    shown = setup["absolute"](page, "1.2.3")
    assert re.findall(r"\]\((?!https://)", shown) == []
    place = "https://github.com/moe-groups/moe-groups/blob/v1.2.3"
    assert [f"]({place}/{link})" in shown for link in own] == [True] * len(own)
    assert shown.count(place) == len(own)
    urls = (ROOT / "pyproject.toml").read_text().partition("[project.urls]")[2].partition("\n\n")[0]
    assert urls.count(f'"{setup["REPOSITORY"]}') == len(urls.split("\n")) - 1


def test_readme_quotes_the_benchmark() -> None:
    """Mixtral's figures are those of ``benchmarks/large_world.py``, to two digits."""
    results = json.loads((ROOT / "benchmarks/results/large_world.json").read_text())
    found = {(row["model"], row["ranks"]): row for row in results["rows"]}
    small, large = found["Mixtral-8x7B", 64], found["Mixtral-8x7B", 128]
    table = (ROOT / "README.md").read_text().partition("| | 64 ranks | 128 ranks |")[2]
    quoted = re.findall(r"\| ([\d.]+) GiB \| ([\d.]+) GiB \|", table)
    *peaks, floor = [tuple(map(float, figures)) for figures in quoted]
    keys = ("stock, default cap", "no cap", "planned", "per expert, lean")
    for key, figures in zip(keys, peaks, strict=True):
        for figure, row in zip(figures, (small, large), strict=True):
            assert figure == pytest.approx(row[key], abs=0.0051), key
    for lean, gradients in zip(peaks[-1], floor, strict=True):
        assert 0 < lean - gradients < 64 / 1024 + 0.01  # a tile
