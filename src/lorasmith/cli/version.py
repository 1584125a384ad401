"""``lorasmith version``: versions of this package and of what it works with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from rich.console import Console

from lorasmith.cli.output import Common, CommonOptions, emit, grid, session

__all__ = ["version", "versions"]

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors")


def versions() -> dict[str, str | None]:
    """Name → version, None where it is not installed. Nothing is imported."""
    from lorasmith import __version__

    found: dict[str, str | None] = {
        "lorasmith": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return found | {name: _installed(name) for name in _PACKAGES}


def _installed(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def version(*, common: CommonOptions = Common()) -> int:  # noqa: B008 - frozen
    """Show the versions of lorasmith and of the packages it works with."""
    with session(common):
        found = versions()

        def render(console: Console) -> None:
            console.print(grid({k: v or "not installed" for k, v in found.items()}))

        emit(common, found, render)
    return 0
