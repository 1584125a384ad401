"""Adapters as files: PEFT's directories, written atomically and read strictly.

``files`` has the functions for users, ``weights`` the adapter as a value (with ``layout``,
``configuration``, ``assembly``, ``writing`` and ``checks`` beside it), ``peft`` what PEFT's
fields mean, ``atomic`` how a directory is replaced, ``fingerprint`` which base an adapter
belongs to, ``hub`` where the files are.
"""

from __future__ import annotations

from lorasmith.io.files import factors, load, read_adapter, save
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.weights import AdapterWeights, BaseModel, FileState

__all__ = [
    "AdapterWeights",
    "BaseModel",
    "FileState",
    "Fingerprint",
    "factors",
    "fingerprint",
    "load",
    "read_adapter",
    "save",
]
