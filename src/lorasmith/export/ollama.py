"""An Ollama Modelfile for a base model with a GGUF adapter.

    FROM <base>                a GGUF file, or a directory of safetensors
    ADAPTER ./adapter.gguf
    TEMPLATE, PARAMETER stop   the chat template, where the tokenizer's can be said so

Ollama's templates are Go's, the tokenizer's are Jinja's. The former is found by rendering the
latter: dialogues of placeholders are rendered and cut at them, which gives the text before and
after what the system, the user and the model say. The pieces are then put together again for other
dialogues; the template is written only if that gives what the tokenizer gives, character by
character. Templates whose text depends on anything else (dates, tools, a counter) fail this, and
Ollama's own choice is left to it: it knows the templates of common models by their GGUF metadata.

A prompt that the tokenizer puts in where no system message is given becomes the template's, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import ModelError
from lorasmith.io.models import ResolvedModel

__all__ = ["MODELFILE", "ChatFormat", "chat_format", "modelfile", "tokenizer_format"]

#: Name of the file.
MODELFILE = "Modelfile"

#: Dialogue → its text; the second argument is whether the model is to answer it.
Render = Callable[[Sequence[Mapping[str, str]], bool], str]
_SYSTEM, _USER, _ANSWER = "\u2983system\u2984", "\u2983user\u2984", "\u2983answer\u2984"


@dataclass(frozen=True)
class ChatFormat:
    """The text around what is said.

    Attributes:
        start: The begin-of-text token, where the template writes it.
        system: Text before and after a system message, or ``None`` if there is no such thing.
        user: Before and after what the user says.
        assistant: Before and after what the model says.
        default: What stands in the place of the system message where none is given.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str

    def render(self, messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        """The text of a dialogue."""
        parts = [self.start]
        if not messages or messages[0]["role"] != "system":
            parts.append(self.default)
        for message in messages:
            around = {"system": self.system, "user": self.user, "assistant": self.assistant}
            before, after = around[message["role"]] or ("", "")
            parts.append(f"{before}{message['content']}{after}")
        if answer:
            parts.append(self.assistant[0])
        return "".join(parts)

    def template(self) -> str:
        """The same in the language of Ollama's templates."""
        user, assistant = map(_pair, (self.user, self.assistant))
        if self.system is not None:
            system = _pair(self.system)
            other = f"{{{{ else }}}}{_text(self.default)}" if self.default else ""
            first = (
                f"{{{{ if .System }}}}{system[0]}{{{{ .System }}}}{system[1]}{other}{{{{ end }}}}"
            )
        else:
            first = _text(self.default)
        return (
            # What starts a text, Ollama's tokenizer puts there itself.
            f"{first}{{{{ if .Prompt }}}}{user[0]}{{{{ .Prompt }}}}{user[1]}{{{{ end }}}}"
            f"{assistant[0]}{{{{ .Response }}}}{assistant[1]}"
        )


def _pair(pair: tuple[str, str]) -> tuple[str, str]:
    return _text(pair[0]), _text(pair[1])


def _text(text: str) -> str:
    """Text as it is written in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def chat_format(render: Render, bos: str | None = None) -> ChatFormat | None:
    """What a chat template puts around what is said, or ``None`` if it cannot be said so.

    Args:
        render: The template: (messages, whether the model is to answer) → text.
        bos: The token that begins a text.
    """
    user = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    system = {"role": "system", "content": _SYSTEM}
    try:
        plain = render([user], True)
        once = render([user, answer], False)
        twice = render([user, answer, user, answer], False)
        try:
            told = render([system, user], True)
        except Exception:  # noqa: BLE001 - templates without system messages raise what they like
            told = None
        found = _pieces(plain, once, twice, told, bos)
        if found is None or not _agrees(found, render, told is not None):
            return None
    except Exception:  # noqa: BLE001 - a template may raise anything; then Ollama has the choice
        return None
    return found


def _pieces(
    plain: str, once: str, twice: str, told: str | None, bos: str | None
) -> ChatFormat | None:
    if any(text.count(_USER) != n for text, n in ((plain, 1), (once, 1), (twice, 2))):
        return None
    head, between = plain.split(_USER)  # between: after the user and before the answer
    rest = once.split(_USER)[1]
    if rest.count(_ANSWER) != 1 or not rest.startswith(between) or not once.startswith(head):
        return None
    after_answer = rest.split(_ANSWER)[1]
    # The second turn shows what stands before a user's words when nothing else does.
    second = twice.split(_ANSWER)[1]
    if not second.startswith(after_answer):
        return None
    before_user = second[len(after_answer) :].split(_USER)[0]
    if not head.endswith(before_user):
        return None
    first = head[: len(head) - len(before_user)]
    # A token that begins every turn (as SmolLM's) is a part of the turn.
    start = bos if bos and first.startswith(bos) and bos not in before_user else ""
    around = None
    if told is not None:
        if told.count(_SYSTEM) != 1 or told.count(_USER) != 1 or not told.startswith(start):
            return None
        before_system, tail = told.split(_SYSTEM)
        after_system = tail.split(_USER)[0]
        if not after_system.endswith(before_user):
            return None
        after_system = after_system[: len(after_system) - len(before_user)]
        around = (before_system[len(start) :], after_system)
    # Where the user's part ends and the answer's begins cannot be seen, and makes no difference.
    return ChatFormat(
        start, around, (before_user, between), ("", after_answer), first[len(start) :]
    )


def _agrees(found: ChatFormat, render: Render, system: bool) -> bool:
    """Whether the pieces give what the template gives, for other dialogues."""

    def said(*turns: str) -> list[dict[str, str]]:
        return [{"role": turn[0], "content": turn[1]} for turn in map(_turn, turns)]

    dialogues = [
        (said("u:Hello there."), True),
        (said("u:One", "a:Two", "u:Three"), True),
        (said("u:One", "a:Two"), False),
    ]
    if system:
        dialogues.append((said("s:Be brief.", "u:One"), True))
        dialogues.append((said("s:Be brief.", "u:One", "a:Two", "u:Three"), True))
    return all(found.render(d, answer) == render(d, answer) for d, answer in dialogues)


def _turn(text: str) -> tuple[str, str]:
    role, _, content = text.partition(":")
    return {"u": "user", "a": "assistant", "s": "system"}[role], content


def tokenizer_format(base: ResolvedModel) -> tuple[ChatFormat | None, str | None, str | None]:
    """The chat format of a model's tokenizer, its end token, and why there is none, if so."""
    from lorasmith.io.models import explained, quiet, remote_code, transformers_module

    transformers = transformers_module()
    arguments: dict[str, Any] = {"local_files_only": base.offline, "revision": base.revision}
    arguments |= remote_code(False)
    if base.gguf_file is not None:
        arguments["gguf_file"] = base.gguf_file
    try:
        with quiet():
            tokenizer = explained(
                lambda: transformers.AutoTokenizer.from_pretrained(base.path, **arguments),
                base.name,
            )
    except Exception as error:  # noqa: BLE001 - the adapter is written all the same
        return None, None, f"the tokenizer cannot be read ({str(error).splitlines()[0]})"
    if not getattr(tokenizer, "chat_template", None):
        return None, None, "the tokenizer has no chat template"

    def render(messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer
        )
        return text

    begin = tokenizer.bos_token
    found = chat_format(render, begin if isinstance(begin, str) else None)
    if found is None:
        return None, None, "the tokenizer's chat template cannot be said in Ollama's language"
    end = tokenizer.eos_token
    return found, end if isinstance(end, str) else None, None


def modelfile(
    base: ResolvedModel,
    adapter: str,
    found: ChatFormat | None,
    end: str | None = None,
    *,
    beside: Path | None = None,
) -> str:
    """The Modelfile.

    Args:
        base: The base model.
        adapter: Name of the adapter's file, which lies beside the Modelfile.
        found: The chat format, if there is one.
        end: The token that ends an answer.
        beside: The directory it will be in.

    Raises:
        ModelError: The base model's name or path would be more than a line.
    """
    lines = ["# ollama create NAME -f Modelfile"]
    local = Path(base.path) / (base.gguf_file or "")
    if base.source == "local":
        lines.append(f"FROM {_short(local, beside)}")
    else:
        title = base.base_name.rpartition("/")[2]
        lines += [
            f"# The GGUF file of {base.base_name}, or its name in Ollama's library:",
            f"FROM ./{title}.gguf",
        ]
    lines.append(f"ADAPTER ./{adapter}")
    for line in lines:
        if not line.isprintable():  # another line of the file, in a name
            raise ModelError("The base model's name cannot be written.", got=repr(line))
    template = None if found is None else found.template()
    # What would end the text early came from a stranger's tokenizer.
    if template is not None and '"""' not in template and not template.endswith('"'):
        lines.append(f'TEMPLATE """{template}"""')
        plain = end is not None and end.isprintable() and '"' not in end and "\\" not in end
        if plain and end and found is not None and end in found.assistant[1]:
            lines.append(f'PARAMETER stop "{end}"')
    return "\n".join(lines) + "\n"


def _short(path: Path, beside: Path | None) -> str:
    """A path that is found from the Modelfile, relative where that is no longer."""
    path = path.resolve()
    if beside is None:
        return str(path)
    relative = os.path.relpath(path, beside.resolve())
    if relative.startswith(os.pardir):
        return str(path)
    return f"./{relative}"
