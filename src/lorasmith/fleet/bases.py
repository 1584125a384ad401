"""Whether the adapters of a fleet were made for one base model.

Adapters of different base models are refused (``BaseMismatchError``): by fingerprint where
both have one, else by the base's name where both have one, and always by the sizes of the
layers that they share. Where there is nothing of the kind to compare, there is a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorasmith.errors import BaseMismatchError
from lorasmith.io.weights import BaseModel

if TYPE_CHECKING:
    from lorasmith.fleet.member import Member

__all__ = ["BaseCheck", "check_known"]


class BaseCheck:
    """Whether adapters, shown one after the other, were made for one base model.

    Args:
        allow_base_mismatch: Compare nothing but the sizes of layers.
    """

    def __init__(self, *, allow_base_mismatch: bool = False) -> None:
        self._allow = allow_base_mismatch
        self._first: Member | None = None
        self._printed: Member | None = None
        #: Whether it has a fingerprint → the first one with a name.
        self._named: dict[bool, Member] = {}
        self._sizes: dict[str, tuple[tuple[int, int], Member]] = {}
        #: What ties adapters together (a fingerprint, a name, layers) → one of its group.
        self._tied: dict[object, object] = {}
        self._groups: dict[object, str] = {}

    @property
    def base(self) -> BaseModel:
        """What is known of the base model, from the adapter that tells most."""
        named = next(iter(self._named.values()), self._first)
        telling = self._printed or named
        return BaseModel() if telling is None else telling.weights.base

    def add(self, member: Member) -> None:
        """Takes one more.

        Raises:
            BaseMismatchError: It was made for another base model than those before.
        """
        base = member.weights.base
        if not self._allow:
            printed = self._printed
            if base.fingerprint is not None and printed is not None:
                assert printed.weights.base.fingerprint is not None
                difference = printed.weights.base.fingerprint.compare(base.fingerprint)
                if not difference.same:
                    raise _mismatch(printed, member, str(difference))
            # Names count where there is no fingerprint on one side or the other.
            for having, other in self._named.items() if base.name is not None else ():
                both = having and base.fingerprint is not None
                if not both and other.weights.base.name != base.name:
                    raise _mismatch(other, member, "by their names")
        sizes = member.sizes
        for module, size in sizes.items():
            known, other = self._sizes.get(module, (size, member))
            if any(a and b and a != b for a, b in zip(known, size, strict=True)):
                raise BaseMismatchError(
                    f"The adapters {other.id!r} and {member.id!r} were made for different base "
                    "models: a layer has other sizes.",
                    file=member.weights.path,
                    key=module,
                    expected=f"{known[0]} → {known[1]}",
                    got=f"{size[0]} → {size[1]}",
                    fix="take adapters of one base model",
                )
        # It is of the same base, as far as anything tells.
        self._first = self._first or member
        if base.fingerprint is not None:
            self._printed = self._printed or member
        if base.name is not None:
            self._named.setdefault(base.fingerprint is not None, member)
        for module, size in sizes.items():
            if module not in self._sizes or not all(self._sizes[module][0]):
                self._sizes[module] = (size, member)
        self._tie(member)

    def _tie(self, member: Member) -> None:
        base, tied = member.weights.base, self._tied

        def root(mark: object) -> object:
            while tied.setdefault(mark, mark) != mark:
                mark = tied[mark]
            return mark

        marks: list[object] = [member.modules]
        if member.modules not in tied:
            marks += member.modules
        if base.fingerprint is not None:
            marks.append(("fingerprint",))
        if base.name is not None:
            marks.append(("name", base.name))
        roots = dict.fromkeys(root(m) for m in marks)
        top = next(iter(roots))
        name = next((self._groups[r] for r in roots if r in self._groups), member.id)
        for other in roots:
            tied[other] = top
            self._groups.pop(other, None)
        self._groups[top] = name

    def warn(self) -> None:
        """Warns (``UserWarning``) if nothing tells that all of them are of one base model.

        That is where two have neither fingerprints nor names to compare, nor a layer that
        both adapt, themselves or by way of others.
        """
        if self._allow or len(self._groups) < 2:
            return
        first, second = list(self._groups.values())[:2]
        _warn_unknown(f"the adapters {first!r} and {second!r}")


def check_known(member: Member, base: BaseModel, modules: Iterable[str]) -> None:
    """Warns (``UserWarning``) if nothing tells that an adapter belongs to a fleet that is there.

    Args:
        member: The adapter.
        base: What is known of the fleet's base model.
        modules: Layers of the fleet; without any there is nothing to compare.
    """
    theirs, known = member.weights.base, set(modules)
    if (
        (base.fingerprint is None or theirs.fingerprint is None)
        and (base.name is None or theirs.name is None)
        and known
        and known.isdisjoint(member.modules)
    ):
        _warn_unknown(f"the adapter {member.id!r} and those of the fleet")


def _warn_unknown(who: str) -> None:
    warnings.warn(
        f"Nothing tells whether {who} were made for one base model: they have neither "
        "fingerprints nor names of it in common, nor a layer. Make sure that they were, and pass "
        "allow_base_mismatch=True (--allow-base-mismatch) to say so.",
        UserWarning,
        stacklevel=4,
    )


def _mismatch(first: Member, second: Member, how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"The adapters {first.id!r} and {second.id!r} were made for different base models ({how}).",
        file=second.weights.path,
        expected=first.weights.base.name,
        got=second.weights.base.name,
        fix="take adapters of one base model, or pass allow_base_mismatch=True "
        "(--allow-base-mismatch) if the two are the same",
    )
