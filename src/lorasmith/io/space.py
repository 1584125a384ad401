"""Whether there is room on a disk for what is about to be written, before the work begins.

Free space is that of the file system as a whole, for this user; quotas are not seen, and what
others write meanwhile is not known. A write that fails all the same leaves what was there
(:mod:`lorasmith.io.atomic`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lorasmith.errors import LorasmithError

__all__ = ["check_space"]


def check_space(
    folder: Path, needed: int, error: type[LorasmithError], what: str, *, fix: str
) -> None:
    """Compares the free space of a file system with what will be written to it.

    Args:
        folder: A directory on it, or one that is yet to be made in the nearest one above.
        needed: Bytes.
        error: What is raised where there are fewer.
        what: What that says.
        fix: What can be done about it.

    Raises:
        LorasmithError: There are fewer; of the class given.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise error(
            what,
            expected=f"{needed / 2**20:,.0f} MiB free",
            got=f"{free / 2**20:,.0f} MiB free",
            fix=fix,
            file=folder,
            key="output",
        )
