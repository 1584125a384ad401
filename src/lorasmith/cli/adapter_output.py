"""Whether a command may write its adapter to a directory, found out before the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import ConfigError

__all__ = ["check_output"]


def check_output(output: Path, overwrite: bool, sources: Sequence[str] = (), own: str = "") -> None:
    """Raises a ``ConfigError`` if writing there would cost the user an adapter.

    Args:
        output: Directory for the result.
        overwrite: Whether an adapter in it may be replaced.
        sources: Adapters that the result is made from, as the user names them; none of them may
            be replaced, whatever ``overwrite`` says.
        own: The message if one of them would be.
    """
    if any(output.exists() and Path(s).exists() and output.samefile(s) for s in sources):
        raise ConfigError(own, got=output, fix="choose another directory", key="--output")
    if not overwrite and (output / "adapter_config.json").exists():
        raise ConfigError(
            "There is an adapter in the output directory already.",
            got=output,
            fix="choose another one, or give --overwrite",
            key="--output",
        )
