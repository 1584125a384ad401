"""Print the pinned requirements of the running environment, for ``make lock``.

What is left out: lorasmith itself (installed from the working tree), the packages of
``no-deps.lock``, pip and its like, and local version labels such as ``+cpu`` (an index
names its builds as it likes; the version is what matters).
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

HEADER = """\
# Exact versions for development and CI (Python 3.11 and later). Written by `make lock`.
# The ranges that users of the package get are in pyproject.toml.
"""


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write the lock file's text to standard output."""
    apart = Path(__file__).with_name("no-deps.lock").read_text(encoding="utf-8")
    skipped = {"lorasmith", "pip", "setuptools", "wheel"}
    skipped |= {
        canonical(line.split("==")[0]) for line in apart.splitlines() if line and line[0] != "#"
    }
    pins = {
        canonical(found.metadata["Name"]): found.version.split("+")[0] for found in distributions()
    }
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    sys.stdout.write(HEADER + "".join(x for x in lines if x.split("==")[0] not in skipped))


if __name__ == "__main__":
    main()
