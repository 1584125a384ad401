"""Which tokenizer an adapter was trained with, as two hashes.

An adapter answers in the tokens that it has seen: behind another vocabulary it is noise, behind
another chat template it is somewhat worse. ``lorasmith train`` therefore writes into our own
record (``lorasmith.json``)

- ``vocabulary``: SHA-256 over all (token, id), sorted by id, and the id that ends a sequence;
- ``template``: SHA-256 of the chat template or templates; ``None`` where there is none.

A token that does nothing but pad is left out of the first: padding is masked everywhere, and which
token does it depends on who has loaded the tokenizer. Not seen are differences in how text is cut
into tokens of the same vocabulary (merges, normalisation).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError, BaseMismatchError

__all__ = ["TokenizerRecord", "check_tokenizer"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TokenizerRecord:
    """Identity of a tokenizer.

    Attributes:
        vocabulary: SHA-256 of tokens and ids, in hexadecimal digits.
        template: SHA-256 of the chat template, or ``None``.
        tokens: Number of tokens.
    """

    vocabulary: str
    template: str | None
    tokens: int

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerRecord:
        """That of a Transformers tokenizer; a record is returned as it is."""
        if isinstance(tokenizer, TokenizerRecord):
            return tokenizer
        tokens: dict[str, int] = dict(tokenizer.get_vocab())
        others = ("eos_token", "bos_token", "unk_token")
        if tokenizer.pad_token not in {getattr(tokenizer, name, None) for name in others}:
            tokens.pop(tokenizer.pad_token, None)
        pairs = sorted((number, token) for token, number in tokens.items())
        template = getattr(tokenizer, "chat_template", None)
        return cls(
            _digest([tokenizer.eos_token_id, *pairs]),
            _digest(template) if template else None,
            len(pairs),
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``lorasmith.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> TokenizerRecord:
        """The inverse of :meth:`to_dict`.

        Raises:
            AdapterFileError: If it is not what :meth:`to_dict` gives.
        """
        if isinstance(values, Mapping) and values.keys() == {"vocabulary", "template", "tokens"}:
            vocabulary, template, tokens = (
                values[key] for key in ("vocabulary", "template", "tokens")
            )
            hashes = [vocabulary, *([] if template is None else [template])]
            if all(isinstance(h, str) and _SHA256.fullmatch(h) for h in hashes) and (
                type(tokens) is int and tokens >= 0
            ):
                return cls(vocabulary, template, tokens)
        raise AdapterFileError(
            "The record of the tokenizer is malformed.",
            key="base.tokenizer",
            expected='{"vocabulary": SHA-256, "template": SHA-256 or null, "tokens": number}',
            got=repr(values)[:200],
        )


def _digest(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_tokenizer(
    stored: TokenizerRecord | None,
    tokenizer: Any,
    *,
    allow: bool = False,
    file: str | Path | None = None,
    fix: str = "use the tokenizer that it was trained with, or pass allow_tokenizer_mismatch=True",
) -> None:
    """Compares a tokenizer with the one that an adapter was trained with.

    Another chat template alone is a warning, for it may be meant.

    Args:
        stored: What the adapter's record says; ``None`` where it says nothing, and nothing is
            compared then.
        tokenizer: A Transformers tokenizer, or its record.
        allow: Whether another vocabulary is a warning, too.
        file: The adapter, for messages.
        fix: What the user can do about another vocabulary.

    Raises:
        BaseMismatchError: The vocabulary is another one.
    """
    if stored is None:
        return
    current = TokenizerRecord.of(tokenizer)
    if current.vocabulary != stored.vocabulary:
        error = BaseMismatchError(
            "The adapter was trained with another tokenizer: tokens have other numbers.",
            expected=f"{stored.tokens:,} tokens, SHA-256 {stored.vocabulary[:12]}…",
            got=f"{current.tokens:,} tokens, SHA-256 {current.vocabulary[:12]}…",
            fix=fix,
            file=file,
            key="base.tokenizer",
        )
        if not allow:
            raise error
        warnings.warn(error.what, UserWarning, stacklevel=2)
    if current.template != stored.template:
        names = [
            "no chat template" if h is None else f"template {h[:12]}…"
            for h in _both(stored, current)
        ]
        warnings.warn(
            f"The adapter was trained with another chat template than this one ({names[0]} there, "
            f"{names[1]} here): its answers may be worse.",
            UserWarning,
            stacklevel=2,
        )


def _both(stored: TokenizerRecord, current: TokenizerRecord) -> tuple[str | None, str | None]:
    return stored.template, current.template
