"""What ``make dist`` has built, checked: ``python -m tests.package`` at the top of a checkout.

The sdist has every file of the repository, and the wheel the package alone; what PyPI shows has
no link that needs a checkout, and links to files that are there.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from pathlib import Path

from tests.support import ROOT

MADE = {"PKG-INFO", "setup.cfg"}


def main() -> None:
    """Exit with one line for each problem, or print what was built."""
    [sdist], [wheel] = (sorted((ROOT / "dist").glob(kind)) for kind in ("*.tar.gz", "*.whl"))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = set(listed.stdout.splitlines())
    package = {name for name in tracked if name.startswith("moe_groups/")}
    with tarfile.open(sdist) as archive:
        inside = {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        package_info = message_from_bytes(archive.read(metadata))
    inside = {name for name in inside - MADE if not name.startswith("moe_groups.egg-info/")}
    problems = [
        *_differences(sdist, inside, tracked),
        *_differences(wheel, names, package),
        *_links(str(package_info.get_payload()), inside),
    ]
    if not tracked:
        problems = ["git lists no files: run this in a checkout."]
    if problems:
        sys.exit("\n".join(problems))
    print(f"{sdist.name}: {len(inside)} files, {wheel.name}: {len(names)} files")


def _differences(path: Path, found: set[str], wanted: set[str]) -> Iterable[str]:
    yield from (f"{path.name} lacks {name}" for name in sorted(wanted - found))
    yield from (f"{path.name} has {name}" for name in sorted(found - wanted))


def _links(page: str, files: set[str]) -> Iterable[str]:
    """What is wrong with the links of the description."""
    folders = {str(parent) for name in files for parent in Path(name).parents}
    for link in re.findall(r"\]\(([^)]+)\)", page):
        ours = re.match(r"https://github\.com/moe-groups/moe-groups/blob/v[^/]+/([^#]+)", link)
        if not link.startswith("https://"):
            yield f"the description's link {link} is not absolute"
        elif ours and ours[1] not in files | folders:
            yield f"the description's link {link} leads nowhere"


if __name__ == "__main__":
    main()
