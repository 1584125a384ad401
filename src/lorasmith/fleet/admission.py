"""Who may enter a shared subspace: one adapter, of the same base model, under a free id.

Base models are the same if their fingerprints agree; where one has none, names count; where one
has no name either, nothing is known against it, and there is a warning if they have no layer in
common. The sizes of layers have to agree in any case.
Among the adapters of one call it is :class:`lorasmith.fleet.members.BaseCheck` that compares;
here they are compared with what the subspace was made of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.fleet.codes import Layer
from lorasmith.fleet.members import Member, Source, check_id, check_known, open_members
from lorasmith.io.weights import BaseModel

__all__ = ["check_base", "check_new", "check_same_layers", "open_one"]


def open_one(source: Source, id: str | None = None, *, allow_base_mismatch: bool = False) -> Member:  # noqa: A002
    """Opens the one adapter that a source stands for.

    Args:
        source: Directory, hub id, URL, or an adapter that has been read.
        id: Its name; by default made of its path.
        allow_base_mismatch: As in ``open_members``.

    Raises:
        ConfigError: The source stands for several, or the id is not usable.
        AdapterFileError: It cannot be read.
        UnsupportedFeatureError: It cannot be part of a fleet.
    """
    member = open_members(
        [source] if id is None else {id: source}, allow_base_mismatch=allow_base_mismatch
    )
    if len(member) != 1:
        raise ConfigError(
            "That is more than one adapter.", expected="one", got=len(member), key="source"
        )
    (one,) = member
    return one


def check_base(
    member: Member, mine: BaseModel, layers: Sequence[Layer], *, allow_base_mismatch: bool = False
) -> None:
    """Raises a ``BaseMismatchError`` if an adapter was made for another base model.

    Args:
        member: The adapter.
        mine: What is known of the base model of the subspace.
        layers: Those of the subspace; one that the adapter has too must have the same sizes.
        allow_base_mismatch: Compare nothing but the sizes.
    """
    if not allow_base_mismatch:
        theirs = member.weights.base
        reason = None
        if mine.fingerprint is not None and theirs.fingerprint is not None:
            difference = mine.fingerprint.compare(theirs.fingerprint)
            reason = None if difference.same else str(difference)
        elif mine.name is not None and theirs.name is not None and mine.name != theirs.name:
            reason = "by their names"
        if reason is not None:
            raise BaseMismatchError(
                f"The adapter {member.id!r} was made for another base model than the "
                f"subspace ({reason}).",
                expected=mine.name,
                got=theirs.name,
                fix="take adapters of one base model, or pass allow_base_mismatch=True "
                "(--allow-base-mismatch) if the two are the same",
            )
        check_known(member, mine, [layer.module for layer in layers])
    known = {layer.module: layer.sizes for layer in layers}
    for module, (d_in, d_out) in member.sizes.items():
        if known.get(module, (d_out, d_in)) != (d_out, d_in):
            raise BaseMismatchError(
                f"The adapter {member.id!r} was made for another base model than the "
                "subspace: a layer has other sizes.",
                key=module,
                expected=f"{known[module][1]} → {known[module][0]}",
                got=f"{d_in} → {d_out}",
            )


def check_new(name: str, taken: Collection[str]) -> None:
    """Raises a ``ConfigError`` if that cannot be an id, or is the id of another adapter."""
    check_id(name)
    if name in taken:
        raise ConfigError(
            "The subspace holds an adapter of that id already.",
            got=repr(name),
            fix="choose another id, or remove that one first",
            key="id",
        )


def check_same_layers(member: Member, held: Collection[str], name: str) -> None:
    """Raises a ``ConfigError`` if an adapter cannot be the one that is held under an id.

    Args:
        member: The adapter.
        held: The layers of the one that is held.
        name: Its id.
    """
    if set(member.modules) != set(held):
        raise ConfigError(
            "That is not the adapter that is held under this id: it has other layers.",
            got=repr(name),
            key="source",
        )
