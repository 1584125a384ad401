"""Secrets are taken out of what is shown, logged or written.

Known by their form: the password in ``https://user:password@host``, the signature or token in a
URL's query, tokens of the hub (``hf_…``), keys of AWS, bearer tokens. And by their value: what the
environment variables of :data:`VARIABLES` hold is a secret wherever it turns up.

A secret of a form that is not known here, and in no such variable, is not recognised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "VARIABLES", "redact", "redact_all"]

#: What stands in the place of a secret.
HIDDEN = "***"
#: Environment variables whose values are secrets.
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
)
#: Shorter values ("1", "test") would take ordinary words out of messages.
_SHORTEST = 8
_FORMS = (
    # Up to the last @ before the path: a password may hold one.
    (re.compile(r"(?<=://)[^/\s@'\"?#]*:[^/\s'\"?#]*(?=@)"), HIDDEN),
    (
        re.compile(
            r"(?i)([?&;](?:x-amz-(?:signature|credential|security-token)|signature|sig|token|"
            r"access_token|api_?key|key|password|secret|awsaccesskeyid)=)[^&;\s'\"]+"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"(?i)\b(bearer )[A-Za-z0-9._~+/-]{8,}=*"), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text with ``***`` in the place of every secret."""
    return _redact(text, _values())


def redact_all(value: Any) -> Any:
    """The same for every text in a value of the types that JSON has; keys stay."""
    return _redact_all(value, _values())


def _values() -> list[str]:
    found = (os.environ.get(variable, "") for variable in VARIABLES)
    return [value for value in found if len(value) >= _SHORTEST]


def _redact_all(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, Mapping):
        return {k: _redact_all(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_all(v, secrets) for v in value]
    return value


def _redact(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    # Each form needs one of these; most texts have none.
    if any(mark in text for mark in ("://", "=", "hf_", "AKIA", "ASIA", "earer ", "EARER ")):
        for pattern, instead in _FORMS:
            text = pattern.sub(instead, text)
    return text
