"""The rules' state inside the optimiser's: what is carried, and what is compared on the way back.

It is an extra entry of the first parameter group, which every ``torch.optim.Optimizer`` carries
along, and so in the checkpoints of any loop that saves its optimiser. Parameters that a rule has
added are taken out of the optimiser's own state, since the loop that loads it does not know them
yet; they come back with the rule's. With the state go the rules' order and options, and how many
steps the optimiser had counted: what loads it compares all three.

A loop without dynamics that loads such a checkpoint hands the entry on in its own, unread:
``torch.optim.Optimizer.load_state_dict`` keeps whatever a group holds, and no code of ours runs
there. The first that can tell is the next driver, by the steps that the optimiser has counted
since (SGD counts none; there it goes unnoticed).

Here are the format and its comparison; when to save and load is the driver's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lorasmith.dynamics.protocol import Dynamic
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["STATE_KEY", "Changed", "check_changed"]

#: Entry of the optimiser's first parameter group that carries the rules' state.
STATE_KEY = "lorasmith_dynamics"

_FORMAT = 2

logger = logging.getLogger(__name__)

#: What to do about a checkpoint of rules with other options or in another order.
Changed = Literal["refuse", "accept"]


def check_changed(changed: Changed) -> None:
    """Raises if that is not a thing to do about changed rules."""
    if changed not in ("refuse", "accept"):
        raise ConfigError(
            "Unknown changed.", expected="refuse or accept", got=repr(changed), key="changed"
        )


def state_of(rules: Sequence[Dynamic], steps: int) -> dict[str, Any]:
    """State, order and options of rules after so many steps."""
    return {
        "format": _FORMAT,
        "steps": steps,
        "rules": {rule.name: rule.state_dict() for rule in rules},
        "options": {rule.name: rule.made_with() for rule in rules},
    }


def check_state(state: Mapping[str, Any], rules: Sequence[Dynamic], changed: Changed) -> None:
    """Raises unless a state is one that these rules may go on from.

    Raises:
        TrainingError: It is that of other rules, of another version, or (unless
            ``changed="accept"``) of the same rules with other options or in another order.
    """
    if state.get("format") != _FORMAT:
        raise TrainingError(
            "The state of the dynamics was written by another version of lorasmith.",
            expected=f"format {_FORMAT}",
            got=f"format {state.get('format')}",
            fix="resume with that version, or start anew: "
            f"optimizer.param_groups[0].pop({STATE_KEY!r})",
        )
    mine, found = [r.name for r in rules], list(state["rules"])
    if sorted(mine) != sorted(found):
        raise TrainingError(
            "The checkpoint is of a run with other dynamics.",
            expected=", ".join(found) or "none",
            got=", ".join(mine),
            fix="resume with the same dynamics, or start anew",
        )
    _compare(rules, state["options"], found, changed)


def _compare(
    rules: Sequence[Dynamic], options: Mapping[str, Any], order: Sequence[str], changed: Changed
) -> None:
    """The rules' order and options with those of the checkpoint."""
    mine = [rule.name for rule in rules]
    differences: list[tuple[str, Any, Any]] = []
    if mine != list(order):
        differences.append(("order", ", ".join(order), ", ".join(mine)))
    for rule in rules:
        then, now = options[rule.name], rule.made_with()
        differences += [
            (f"{rule.name}.{key}", _shown(then, key), _shown(now, key))
            for key in dict.fromkeys([*then, *now])
            if key not in then or key not in now or then[key] != now[key]
        ]
    _refuse_or_warn(
        changed,
        differences,
        "The checkpoint is of a run with the same dynamics, but not as they are now.",
        "resume with what the checkpoint has",
    )


def _refuse_or_warn(
    changed: Changed, differences: Sequence[tuple[str, Any, Any]], what: str, fix: str
) -> None:
    if not differences:
        return
    saved, present = ("; ".join(f"{row[0]} {row[i]}" for row in differences) for i in (1, 2))
    if changed == "refuse":
        raise TrainingError(
            what,
            expected=f"as in the checkpoint: {saved}",
            got=present,
            fix=f'{fix}, or go on with changed="accept"',
            key=differences[0][0],
        )
    logger.warning("%s Going on: %s → %s.", what, saved, present)


def put_in(
    optimizer: torch.optim.Optimizer,
    packed: Mapping[str, Any],
    added: Mapping[str, nn.Parameter],
    dynamics: Mapping[str, Any],
) -> dict[str, Any]:
    """The optimiser's state with the rules', and without the parameters they added.

    Args:
        optimizer: Whose state it is.
        packed: Its ``state_dict()``.
        added: Parameters that rules have added to it, by name.
        dynamics: From :func:`state_of`.
    """
    mine = {id(p): name for name, p in added.items()}
    groups, states, stash = [], {}, {}
    renamed: dict[Any, int] = {}
    names: dict[Any, str] = {}
    for group, live in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        kept = []
        for index, parameter in zip(group["params"], live["params"], strict=True):
            if id(parameter) in mine:
                names[index] = mine[id(parameter)]
            else:
                kept.append(renamed.setdefault(index, len(renamed)))
        group = {**group, "params": kept}
        if "param_names" in group:
            group["param_names"] = [n for n in group["param_names"] if n not in mine.values()]
        groups.append(group)
    for index, value in packed["state"].items():
        if index in names:
            stash[names[index]] = dict(value)
        else:
            states[renamed.get(index, index)] = value
    groups[0][STATE_KEY] = {
        "dynamics": dynamics,
        "added": stash,
        "counted": _counted(states.values()),
    }
    return {**packed, "state": states, "param_groups": groups}


def take_out(optimizer: torch.optim.Optimizer) -> Mapping[str, Any] | None:
    """What :func:`put_in` put in, out of an optimiser that has loaded it; ``None`` if nothing."""
    carried = None
    for group in optimizer.param_groups:
        carried = group.pop(STATE_KEY, None) or carried
    return carried


def check_fresh(
    optimizer: torch.optim.Optimizer, carried: Mapping[str, Any], changed: Changed
) -> None:
    """Raises if steps were made without dynamics since their state was saved."""
    then, now = carried.get("counted"), _counted(optimizer.state.values())
    if then is not None and now is not None and then != now:
        _refuse_or_warn(
            changed,
            [("optimiser steps", then, now)],
            "The optimiser has made steps since the state of dynamics that it carries: a loop "
            "without them went on, or a state_dict() was kept without copying it.",
            "resume from the checkpoint of the dynamics, or start them anew: "
            f"optimizer.param_groups[0].pop({STATE_KEY!r})",
        )


def _shown(options: Mapping[str, Any], key: str) -> str:
    return repr(options[key]) if key in options else "absent"


def _counted(states: Iterable[Mapping[str, Any]]) -> int | None:
    """The most steps that an optimiser has counted for a parameter; ``None`` if it counts none."""
    return max((int(state["step"]) for state in states if "step" in state), default=None)
