"""Everything is in ``pyproject.toml``, but for the description that PyPI shows.

That is ``README.md`` with its links to files of the repository made absolute: PyPI has none of
these files. They lead to the tag of the release, where the files are those that it was made of.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/moe-groups/moe-groups"


def absolute(page: str, version: str) -> str:
    """The page with absolute links; links to headings and to other sites stay as they are."""
    files = f"{REPOSITORY}/blob/v{version}/"
    return re.sub(r"\]\((?!https?://|#)", f"]({files}", page)


if __name__ == "__main__":
    [release] = re.findall(r'__version__ = "(.+)"', (ROOT / "moe_groups/_version.py").read_text())
    setup(
        long_description=absolute((ROOT / "README.md").read_text(), release),
        long_description_content_type="text/markdown",
    )
