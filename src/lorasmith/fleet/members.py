"""The adapters of a fleet, opened: what is meant by a source, and under which ids.

Each is a :class:`~lorasmith.fleet.member.Member` (which adapters can be one is said there); all
of them must be of one base model (``fleet.bases``).

By default an id is the directory's name, or as much of the path as tells it from the others.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.fleet.bases import BaseCheck, check_known
from lorasmith.fleet.ids import check_id, unknown_id
from lorasmith.fleet.member import LayerFactors, Member, MemberRecord, Source, admit
from lorasmith.fleet.rebuilding import rebuild
from lorasmith.io.hub import adapters_below, is_url
from lorasmith.io.weights import AdapterWeights

__all__ = [
    "BaseCheck",
    "LayerFactors",
    "Member",
    "MemberRecord",
    "Source",
    "check_id",
    "check_known",
    "expand",
    "open_members",
    "rebuild",
    "unknown_id",
]


def open_members(
    sources: Source | Sequence[Source] | Mapping[str, Source],
    ids: Sequence[str] | None = None,
    *,
    allow_base_mismatch: bool = False,
    needs: Literal["factors", "delta"] = "factors",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Member]:
    """Opens adapters as the members of a fleet.

    Args:
        sources: Directories (one that holds adapters in its subdirectories stands for all of
            them), hub ids, URLs (``s3://…``), adapters that have been read; or a mapping of
            ids to these, each of which is one adapter then.
        ids: One for each adapter, in order; by default names made of their paths.
        allow_base_mismatch: Whether they may name, or have the fingerprint of, different base
            models. Layers of the same name must have the same sizes all the same.
        needs: ``"delta"`` also admits adapters whose change is not B A, for what works on
            effective deltas (``Member.delta`` with the base weight).
        progress: Called with ("open", adapters opened, adapters).

    Raises:
        AdapterFileError: If one cannot be read, or there is none.
        BaseMismatchError: If two were made for different base models.
        UnsupportedFeatureError: If one cannot be part of a fleet; see the module.
        ConfigError: If ids are not usable, not unique, or of another number.
    """
    if isinstance(sources, Mapping):
        if ids is not None:
            raise ConfigError("A mapping brings its own ids.", fix="leave ids out", key="ids")
        given = list(sources.values())
        names: list[str] | None = list(sources)
    else:
        given = expand(sources)
        names = None if ids is None else list(ids)
    if not given:
        raise AdapterFileError("There is no adapter.", expected="at least one", key="sources")
    if names is None:
        names = default_ids(given)
    if len(names) != len(given):
        raise ConfigError(
            "There are not as many ids as adapters.",
            expected=f"{len(given)} ids",
            got=len(names),
            key="ids",
        )
    for name in names:
        check_id(name)
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            "Two adapters have the same id.", expected="unique ids", got=repr(twice[0]), key="ids"
        )
    members = []
    for name, source in zip(names, given, strict=True):
        members.append(admit(name, source, needs))
        if progress is not None:
            progress("open", len(members), len(given))
    check = BaseCheck(allow_base_mismatch=allow_base_mismatch)
    for member in members:
        check.add(member)
    if not all(isinstance(source, Member) for source in given):  # those were opened before
        check.warn()
    return members


def expand(sources: Source | Iterable[Source]) -> list[Source]:
    """The single adapters that are meant: directories of adapters become what they hold.

    A directory, local or a URL, that holds no ``adapter_config.json`` and whose
    subdirectories do stands for all of those, sorted by name. Everything else is left as it is.
    """
    single = isinstance(sources, str | os.PathLike | AdapterWeights | Member)
    items: list[Source] = [sources] if single else list(sources)  # type: ignore[list-item, arg-type]
    found: list[Source] = []
    for item in items:
        below = None
        if isinstance(item, str | os.PathLike):
            below = adapters_below(item)
        found.extend(below or [item])
    return found


def default_ids(sources: Sequence[Source]) -> list[str]:
    """A unique id for each source: the last part of its path, and more of it where needed."""
    parts = [_path_parts(source) for source in sources]
    lengths = dict.fromkeys(parts, 1)
    while True:
        # The same path twice cannot be told apart by more of it.
        counts = Counter("/".join(p[-n:]) for p, n in lengths.items())
        longer = [p for p, n in lengths.items() if counts["/".join(p[-n:])] > 1 and n < len(p)]
        if not longer:
            break
        for path in longer:
            lengths[path] += 1
    names = ["/".join(p[-lengths[p] :]) for p in parts]
    # The same path again is another adapter of the fleet, e.g. in a merge of copies.
    seen: Counter[str] = Counter()
    taken, unique = set(names), []
    for name in names:
        seen[name] += 1
        if seen[name] == 1:
            unique.append(name)
            continue
        number = seen[name]
        while f"{name}#{number}" in taken:
            number += 1
        taken.add(f"{name}#{number}")
        unique.append(f"{name}#{number}")
    return unique


def _path_parts(source: Source) -> tuple[str, ...]:
    if isinstance(source, Member):
        return (source.id,)
    if isinstance(source, AdapterWeights):
        if source.path is None:
            return ("adapter",)
        text = os.fspath(source.path)
    else:
        text = os.fspath(source)
    if is_url(text):
        text = text.split("://", 1)[1]
    elif Path(text).expanduser().exists():
        text = os.fspath(Path(text).expanduser().resolve())
    parts = [p for p in text.replace("\\", "/").split("/") if p not in ("", ".")]
    clean = ["".join(c for c in p if unicodedata.category(c) not in ("Cc", "Cs")) for p in parts]
    return tuple(c for c in clean if c) or ("adapter",)
