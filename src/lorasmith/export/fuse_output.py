"""Where a fused model is written: whether it may be, and what stands beside its weights.

A directory is replaced only where the report of an earlier fusing says that it is one of ours.
Beside the weights go the generation's defaults, the tokenizer (the adapter's, where its directory
holds one and it is alone) and the code of a model that brings its own, which is not run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasmith.errors import ConfigError, FuseError, LorasmithError
from lorasmith.export.fuse_adapters import Part
from lorasmith.export.fuse_base import Base
from lorasmith.export.fuse_plan import Plan
from lorasmith.io import space
from lorasmith.io.strict import check_inside, parse_object

__all__ = [
    "REPORT",
    "check_space",
    "check_target",
    "check_tokenizer",
    "copies_beside",
    "written_before",
]

#: The report beside the model; also the sign that a directory may be overwritten.
REPORT = "fuse_report.json"
_CONFIGS = ("generation_config.json",)
_TOKENIZER = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r".*\.model|.*\.tiktoken|chat_template\.(jinja|json)|(pre)?processor_config\.json"
)
#: Files that make a directory one with a tokenizer of its own.
_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_target(target: Path, overwrite: bool, base: Base, parts: Sequence[Part]) -> None:
    """Raises a ``ConfigError`` if writing there would destroy something."""
    real = Path(os.path.realpath(target))
    taken = [base.folder, *(p.weights.path for p in parts)]
    if any(path is not None and Path(os.path.realpath(path)) == real for path in taken):
        raise ConfigError(
            "The model would take the place of what it is made from.",
            got=target,
            fix="choose another directory",
            key="output",
        )
    if real.is_file() or (target.is_symlink() and not target.exists()):
        raise ConfigError(
            "A model is a directory, and there is a file under that path.", got=target, key="output"
        )
    if not real.is_dir() or not any(real.iterdir()):
        return
    if not (real / REPORT).is_file():
        raise ConfigError(
            "The directory holds something that no earlier fusing wrote; it is not touched.",
            got=", ".join(sorted(e.name for e in real.iterdir())[:4]),
            fix="choose a new or empty directory",
            file=target,
            key="output",
        )
    if not overwrite:
        raise ConfigError(
            "There is a fused model in that directory.",
            fix="choose another one, or replace it with overwrite=True (--overwrite)",
            file=target,
            key="output",
        )


def written_before(target: Path) -> list[str]:
    """The files of the earlier generation; plain names alone, whatever the report says."""
    file = target / REPORT
    try:
        names = parse_object(file.read_bytes(), file).get("files")
    except (OSError, LorasmithError):
        return []
    found = names if isinstance(names, list) else []
    return [n for n in found if isinstance(n, str) and n and Path(n).name == n]


def check_space(target: Path, wanted: int) -> None:
    """Raises a ``FuseError`` if the disk has less than ``wanted`` bytes free."""
    # The model is written beside its predecessor, hence in the directory above.
    space.check_space(
        Path(os.path.realpath(target)).parent,
        wanted,
        FuseError,
        "There is not enough room on the disk for the model.",
        fix="free some, choose another disk, or a smaller dtype",
    )


def copies_beside(base: Base, parts: Sequence[Part]) -> tuple[dict[str, Path], str]:
    """Name → file of what stands beside the weights, and whose tokenizer it is."""
    found: dict[str, Path] = {}
    origin = "none"
    if base.folder is not None:
        found = {n: base.folder / n for n in _CONFIGS if (base.folder / n).is_file()}
        tokenizer = _tokenizer_files(base.folder)
        found |= tokenizer
        origin = "base" if set(tokenizer) & set(_CORE) else "none"
        if base.config.get("auto_map"):
            # Copied, and not run.
            found |= {p.name: p for p in base.folder.glob("*.py") if p.is_file()}
    (part, *more) = parts
    folder = part.weights.path
    if folder is not None and not more:
        own = _tokenizer_files(folder)
        if set(own) & set(_CORE):
            found = {n: p for n, p in found.items() if _TOKENIZER.fullmatch(n) is None} | own
            origin = "adapter"
    for path in found.values():
        # What a stranger's link leads to is not copied into a model that may be published.
        check_inside(path, path.parent)
    return found, origin


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    return {
        entry.name: entry
        for entry in sorted(folder.iterdir())
        if _TOKENIZER.fullmatch(entry.name) is not None and entry.is_file()
    }


def check_tokenizer(plan: Plan, origin: str, copies: Mapping[str, Path]) -> None:
    """The adapter's tokenizer must not know more tokens than there are rows."""
    file = copies.get("tokenizer.json")
    if origin != "adapter" or file is None or plan.vocabulary is not None:
        return
    fields = parse_object(file.read_bytes(), file)
    added = fields.get("added_tokens")
    ids = [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    most = max((i for i in ids if type(i) is int), default=-1)
    rows = plan.changes.embedding_rows
    if rows is not None and most >= rows:
        raise FuseError(
            "The adapter's tokenizer has tokens that the model has no embedding for.",
            expected=f"ids below {rows:,}",
            got=f"{most:,}",
            fix="save the adapter again with its embedding and head (PEFT: "
            "save_embedding_layers=True)",
            file=file,
        )
