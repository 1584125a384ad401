"""Examples to token ids and labels, for one tokenizer, with or without a chat template.

A conversation is rendered by the template, and its supervised spans are found by rendering its
prefixes; a prompt and its completion are joined by a separator where there is no template. A
label is the token's own id inside a span and :data:`IGNORE_INDEX` elsewhere. The boundary of a
span is where generation would begin: the tokens before it are those of the prefix alone
(:func:`encode_prompt` gives the same), and where a token of the whole text would reach over it,
the pieces are tokenised one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.errors import DataError, LorasmithError, first_line, short
from lorasmith.training.examples import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "Encoder", "Tokens", "encode_prompt"]

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in PyTorch and Transformers."""

Tokens = tuple[list[int], list[int], bool]
"""Token ids, labels, and whether the example may be cut into several."""


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    separator: str = "\n",
    reference: str = "",
) -> list[int]:
    """Token ids from which to generate an answer: those that precede it in training.

    Args:
        prompt: A prompt, or the turns of a conversation so far.
        tokenizer: As in :func:`tokenise`.
        system: As in :func:`tokenise`.
        separator: As in :func:`tokenise`.
        reference: The expected answer, where it is known. Only matters without a chat template:
            no separator is put before an answer that begins with white space of its own.
    """
    encoder = Encoder(tokenizer, system, separator)
    if not encoder.has_template:
        if not isinstance(prompt, str):
            raise encoder.no_template(0)
        return encoder.ids([encoder.join(prompt, reference)], bos=True)[0]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = encoder.render(encoder.with_system(turns), 0, generation=True)
    return encoder.ids([text])[0]


@dataclass(frozen=True)
class _Span:
    """A rendered conversation and the character ranges [start, end) that are supervised."""

    index: int
    text: str
    spans: tuple[tuple[int, int], ...]


class Encoder:
    """Examples → token ids and labels, for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None, separator: str
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.system = system
        self.separator = separator
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so a model could not learn to stop.",
                expected="a token of the vocabulary",
                got="none",
                fix="set eos_token in its tokenizer_config.json, or tokenizer.eos_token",
                file=str(getattr(tokenizer, "name_or_path", "")) or "tokenizer_config.json",
                key="eos_token",
            )
        if system is not None and not self.has_template:
            raise DataError(
                "A system message needs a chat template, and this tokenizer has none.",
                fix="leave the system message out, or put it into the prompts",
            )
        self.eos: int = self.tokenizer.eos_token_id
        # Whether the tokenizer begins a text with its bos token differs from model to model,
        # and a bos token alone does not tell (SmolLM2 has one that it never adds).
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a").input_ids[:1]
        self.bos: list[int] = [bos] if bos is not None and first == [bos] else []
        # Often the end of a turn is not the eos token, only some special token of the vocabulary.
        added = self.tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        self.stops = frozenset(special | set(self.tokenizer.all_special_ids) | {self.eos})

    def encode(self, found: Sequence[tuple[int, Example]]) -> Iterator[Tokens]:
        """Token ids, labels, and whether the example may be cut into several."""
        done: dict[int, Tokens] = {}
        conversations: list[tuple[int, _Span]] = []
        pairs: list[tuple[int, int, str, str]] = []
        texts: list[tuple[int, str]] = []
        for place, (index, example) in enumerate(found):
            if example.text is not None:
                texts.append((place, example.text))
            elif example.prompt is not None and example.completion is not None:
                if self.has_template:
                    turns = (
                        {"role": "user", "content": example.prompt},
                        {"role": "assistant", "content": example.completion},
                    )
                    conversations.append((place, self.conversation(turns, 1, index)))
                else:
                    prompt = self.join(example.prompt, example.completion)
                    pairs.append((place, index, prompt, example.completion))
            else:
                if not self.has_template:
                    raise self.no_template(index)
                span = self.conversation(example.messages, example.first_supervised, index)
                conversations.append((place, span))
        for (place, _), ids in zip(texts, self.ids([t for _, t in texts], bos=True), strict=True):
            ids = [*ids, self.eos]
            done[place] = (ids, [IGNORE_INDEX, *ids[1:]], True)
        self._encode_pairs(pairs, done)
        self._encode_conversations(conversations, done)
        for place in range(len(found)):
            yield done[place]

    def ids(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """Token ids of each text, with no special token added but (if asked) bos."""
        if not texts:
            return []
        # Length is limited later and reported then, so the tokenizer's own warning is noise.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        start = self.bos if bos else []
        return [[*start, *ids] for ids in encoded.input_ids]

    # Texts without a template

    def join(self, prompt: str, completion: str) -> str:
        """The prompt with what stands between it and the completion."""
        open_end = not prompt or not prompt[-1].isspace()
        open_start = not completion or not completion[0].isspace()
        return prompt + self.separator if open_end and open_start else prompt

    def _encode_pairs(
        self, pairs: Sequence[tuple[int, int, str, str]], done: dict[int, Tokens]
    ) -> None:
        prompts = self.ids([prompt for _, _, prompt, _ in pairs], bos=True)
        wholes = self.ids([prompt + answer for _, _, prompt, answer in pairs], bos=True)
        for (place, index, prompt, answer), before, whole in zip(
            pairs, prompts, wholes, strict=True
        ):
            cuts = [len(prompt)]
            ids, ends = self._cut(prompt + answer, cuts, [before], whole, index, True)
            ids = [*ids, self.eos]
            done[place] = _labelled(ids, [(ends[0], len(ids))])

    # Conversations

    def no_template(self, index: int) -> DataError:
        return DataError(
            f"Row {index} is a conversation, and the tokenizer has no chat template.",
            expected="a tokenizer with a chat template, or rows with prompt and completion",
            fix="use an instruction-tuned model, or set tokenizer.chat_template",
        )

    def with_system(self, turns: Sequence[Message]) -> list[Message]:
        if self.system is None or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def render(self, turns: Sequence[Message], index: int, *, generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns), tokenize=False, add_generation_prompt=generation
                )
            )
        except LorasmithError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise DataError(
                f"Row {index}: the chat template cannot be applied.",
                got=first_line(error),
                fix="check that roles alternate as the model's chat template requires",
            ) from error

    def conversation(self, turns: Sequence[Message], first: int, index: int) -> _Span:
        """Render a conversation and find its supervised spans by rendering its prefixes."""
        shift = len(self.with_system(turns)) - len(turns)
        turns, first = self.with_system(turns), first + shift
        text = self.render(turns, index, generation=False)
        spans: list[tuple[int, int]] = []
        for i in range(first, len(turns)):
            if turns[i]["role"] != "assistant":
                continue
            if i == 0:
                raise DataError(
                    f"Row {index} begins with the assistant's turn.",
                    expected="a user's or system's turn before it",
                    got=short(turns[0]),
                    fix="put what was asked before the answer, or leave such rows out",
                )
            before = self.render(turns[:i], index, generation=True)
            last = i + 1 == len(turns)
            upto = text if last else self.render(turns[: i + 1], index, generation=False)
            if not upto.startswith(before) or not text.startswith(upto):
                raise DataError(
                    f"Row {index}: the chat template renders turn {i} differently once more "
                    "turns follow, so its tokens cannot be supervised.",
                    expected="each prefix of the conversation to be a prefix of its text",
                    got=_divergence(upto, before)
                    if not upto.startswith(before)
                    else _divergence(text, upto),
                    fix="make one row of each answer, or use a template without such rules",
                )
            spans.append((len(before), len(upto)))
        return _Span(index, text, tuple(spans))

    def _encode_conversations(
        self, conversations: Sequence[tuple[int, _Span]], done: dict[int, Tokens]
    ) -> None:
        wholes = self.ids([span.text for _, span in conversations])
        # All prefixes of all rows in one call: a fast tokenizer then uses every core.
        wanted = [
            span.text[:cut] for _, span in conversations for pair in span.spans for cut in pair
        ]
        prefixes = iter(self.ids(wanted))
        for (place, span), whole in zip(conversations, wholes, strict=True):
            cuts = [cut for pair in span.spans for cut in pair]
            before = [next(prefixes) for _ in cuts]
            ids, ends = self._cut(span.text, cuts, before, whole, span.index, False)
            ranges = [
                (start, self._end_of_turn(ids, start, end))
                for start, end in zip(ends[::2], ends[1::2], strict=True)
            ]
            if ranges and ranges[-1][1] == len(ids) and ids[-1] not in self.stops:
                # The template marks no end of turn: without eos the model never learns to stop.
                ids = [*ids, self.eos]
                ranges[-1] = (ranges[-1][0], len(ids))
            done[place] = _labelled(ids, ranges)

    def _end_of_turn(self, ids: Sequence[int], start: int, end: int) -> int:
        """Leave out what follows the end-of-turn token (a newline): generation stops before."""
        for i in range(end - 1, start - 1, -1):
            if ids[i] in self.stops:
                return i + 1
        return end

    def _cut(
        self,
        text: str,
        cuts: Sequence[int],
        prefixes: Sequence[list[int]],
        whole: list[int],
        index: int,
        bos: bool,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text and, for every character cut, the number of tokens before it.

        The tokens of each prefix must begin the tokens of the whole text. Where a token would
        reach over a cut (a newline before the cut and one after it, say), the pieces between
        the cuts are tokenised one by one: the cut is what generation sees.
        """
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            return whole, [len(prefix) for prefix in prefixes]
        edges = [0, *cuts, len(text)]
        pieces = self.ids([text[a:b] for a, b in itertools.pairwise(edges)])
        ids = list(self.bos) if bos else []
        ends = []
        for piece in pieces:
            ids += piece
            ends.append(len(ids))
        if ids[: len(prefixes[0])] != prefixes[0] or self.tokenizer.decode(
            ids
        ) != self.tokenizer.decode(whole):
            raise DataError(
                f"Row {index}: the tokenizer gives no stable boundary between prompt and answer.",
                expected="the tokens of the prompt to begin the tokens of the whole",
                got=short(text[max(0, cuts[0] - 20) : cuts[0] + 20]),
                fix="separate prompt and completion by a space or newline",
            )
        return ids, ends[:-1]


def _labelled(ids: list[int], ranges: Iterable[tuple[int, int]]) -> Tokens:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in ranges:
        labels[start:end] = ids[start:end]
    if labels:
        labels[0] = IGNORE_INDEX
    return ids, labels, False


def _divergence(text: str, prefix: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b),
        min(len(text), len(prefix)),
    )
    begin = max(0, at - 10)
    return f"{short(prefix[begin : at + 30])} becomes {short(text[begin : at + 30])}"
