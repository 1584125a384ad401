"""The forms of a row: from columns to examples that no longer depend on them.

:func:`examples_of` knows the table of forms in :mod:`lorasmith.training.data`: which columns make
which form, in which order they are looked for, and that turns may be written as ShareGPT does
(``from`` and ``value``). Which tokens are supervised follows from the :class:`Example` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import DataError, short

__all__ = ["Example", "Message", "examples_of"]

Message = dict[str, Any]
"""A turn of a conversation: at least ``role`` and ``content``."""


@dataclass(frozen=True)
class Example:
    """One training example in a form that no longer depends on the columns it came from.

    Exactly one of ``messages`` (a conversation), ``prompt`` with ``completion`` (both texts),
    or ``text`` is set.

    Attributes:
        messages: Turns with at least ``role`` and ``content``.
        first_supervised: Assistant turns from this index on are supervised.
        prompt: Text that is given.
        completion: Text that is learned.
        text: Text that is learned from its first token on.
    """

    messages: tuple[Message, ...] = ()
    first_supervised: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @property
    def answers_nothing(self) -> bool:
        """Whether all that could be learned is to end at once: every answer is empty."""
        if self.completion is not None:
            return not self.completion.strip()
        turns = [m for m in self.messages[self.first_supervised :] if m["role"] == "assistant"]
        return bool(turns) and not any(
            m.get("tool_calls") or str(m["content"]).strip() for m in turns
        )

    def as_prompt(self) -> tuple[str | tuple[Message, ...], str]:
        """What a model is given, and the reference for what it should answer.

        For a conversation: all turns before the last assistant turn, and that turn's content.

        Raises:
            DataError: The example is plain text, or its conversation has no answer.
        """
        if self.prompt is not None and self.completion is not None:
            return self.prompt, self.completion
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if not turns or turns[-1] < self.first_supervised:
            raise DataError(
                "The row has no prompt with an answer to compare with.",
                expected="prompt and completion, or messages with an assistant turn",
                got="plain text" if self.text is not None else "no assistant turn",
            )
        return self.messages[: turns[-1]], str(self.messages[turns[-1]]["content"])


_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def examples_of(row: Mapping[str, Any], *, index: int = 0) -> tuple[Example, ...]:
    """The examples in one row; more than one only for ``instances``.

    Args:
        row: Column → value.
        index: Number of the row, for error messages.

    Raises:
        DataError: The columns fit no form, or a value has the wrong type.
    """
    # A column that is null in this row counts as absent: Arrow fills mixed rows with nulls.
    have = {name for name, value in row.items() if value is not None}
    for column in ("messages", "conversations"):
        if column in have:
            return (Example(messages=_messages(row[column], column, index)),)
    for first, second in _PAIRS:
        if first in have and second in have:
            return (_pair(row[first], row[second], (first, second), index),)
    output = next((c for c in ("output", "response") if c in have), None)
    if "instruction" in have and output is not None:
        context = next((c for c in ("input", "context") if c in have), None)
        prompt = _instruction(row["instruction"], row[context] if context else "", index)
        return (Example(prompt=prompt, completion=_text(row[output], output, index)),)
    if "instruction" in have and "instances" in have:
        return _instances(row["instruction"], row["instances"], index)
    if "text" in have:
        return (Example(text=_text(row["text"], "text", index)),)
    empty = sorted(set(row) - have)
    raise DataError(
        f"Row {index} has none of the known forms.",
        expected="messages; prompt and completion; question and answer; "
        "instruction, [input] and output; or text",
        got=f"the columns {sorted(have)}" + (f", empty: {empty}" if empty else ""),
        fix="rename the columns, e.g. dataset.rename_columns({'source': 'prompt', …})"
        + (", or fill or leave out rows with empty cells" if empty else ""),
    )


def _text(value: Any, column: str, index: int) -> str:
    if isinstance(value, str):
        return value
    # NaN is what other programs write for a cell without a value, not an answer to be learned.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise DataError(
        f"Row {index}: {column} is not text.",
        expected="a string or a finite number",
        got=short(value),
        fix=f"write {column} as a string in every row, or leave such rows out",
        key=column,
    )


def _instances(instruction: Any, instances: Any, index: int) -> tuple[Example, ...]:
    if not isinstance(instances, (list, tuple)) or not all(
        isinstance(instance, Mapping) for instance in instances
    ):
        raise DataError(
            f"Row {index}: instances is not a list of instances.",
            expected="a list of {'input': …, 'output': …}",
            got=short(instances),
            fix="write instances as a list of objects, or as rows with instruction and output",
            key="instances",
        )
    return tuple(
        Example(
            prompt=_instruction(instruction, instance.get("input") or "", index),
            completion=_text(instance.get("output"), "instances.output", index),
        )
        for instance in instances
    )


def _instruction(instruction: Any, context: Any, index: int) -> str:
    head = _text(instruction, "instruction", index)
    body = _text(context, "input", index)
    return f"{head}\n\n{body}" if body.strip() else head


def _pair(prompt: Any, completion: Any, columns: tuple[str, str], index: int) -> Example:
    if isinstance(prompt, (list, tuple)) or isinstance(completion, (list, tuple)):
        before = (
            _messages(prompt, columns[0], index)
            if isinstance(prompt, (list, tuple))
            else ({"role": "user", "content": _text(prompt, columns[0], index)},)
        )
        after = (
            _messages(completion, columns[1], index)
            if isinstance(completion, (list, tuple))
            else ({"role": "assistant", "content": _text(completion, columns[1], index)},)
        )
        return Example(messages=before + after, first_supervised=len(before))
    return Example(
        prompt=_text(prompt, columns[0], index), completion=_text(completion, columns[1], index)
    )


def _messages(value: Any, column: str, index: int) -> tuple[Message, ...]:
    def bad(what: str, got: object) -> DataError:
        return DataError(
            f"Row {index}: {column} {what}.",
            expected="a non-empty list of {'role': …, 'content': …}",
            got=short(got),
            fix=f"write {column} as a list of turns with role and content"
            + ("" if column in ("messages", "conversations") else ", or as text"),
            key=column,
        )

    if not isinstance(value, (list, tuple)) or not value:
        raise bad("is not a list of messages", value)
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise bad("has a turn that is not an object", turn)
        # Arrow gives every turn every key that any turn has.
        message = {key: item for key, item in turn.items() if item is not None}
        if "role" not in message and isinstance(message.get("from"), str):
            role = message.pop("from")
            message["role"] = _SHAREGPT_ROLES.get(role, role)
            message["content"] = message.pop("value", None)
        if not isinstance(message.get("role"), str):
            raise bad("has a turn without a role", turn)
        if message.get("content") is None and "tool_calls" not in message:
            raise bad("has a turn without content", turn)
        message.setdefault("content", "")
        messages.append(message)
    return tuple(messages)
