"""What the contract suite tries: each variant's options that change what is computed.

The smallest layers of the tiny models are 6 → 8 and 8 → 5, so ranks and blocks are small.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import lorasmith as ls

__all__ = ["CONFIGURATIONS"]

#: Ends of the names of the layers whose input IA3 scales, over all families.
_INNER = "re:.*(down_proj|c_proj|lin2|(^|[.])2)"
_LORA = ls.LoRAConfig(r=4, alpha=6.0)
_DORA = ls.DoRAConfig(r=4, alpha=6.0)
_INITS = ("kaiming", "gaussian", "pissa", "pissa_niter_4")

#: Variant → name of the test case → configuration.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {init: dataclasses.replace(_LORA, init=init) for init in _INITS},
    "dora": {init: dataclasses.replace(_DORA, init=init) for init in _INITS},
    "ia3": {"outputs": ls.IA3Config(), "feedforward": ls.IA3Config(feedforward=_INNER)},
    "ia3_ff": {"inputs": ls.IA3FFConfig()},
}
