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
#: All layers but those with an odd number of outputs, and heads.
_EVEN = "re:(?!1$|2$|lm_head|classifier).*"
_LORA = ls.LoRAConfig(r=4, alpha=6.0)
_DORA = ls.DoRAConfig(r=4, alpha=6.0)
_INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "corda")
#: LoRA-GA needs 2 r singular vectors.
_LORA_GA = {"init": "lora_ga", "r": 2, "alpha": 3.0}

#: Variant → name of the test case → configuration.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {
        **{init: dataclasses.replace(_LORA, init=init) for init in _INITS},
        "eva": dataclasses.replace(_LORA, init="eva", init_options={"rho": 1}),
        "eva ranks": dataclasses.replace(_LORA, init="eva"),
        "lora_ga": dataclasses.replace(_LORA, **_LORA_GA),
        "frozen A": dataclasses.replace(_LORA, train_A=False),
        "frozen A, pissa": dataclasses.replace(_LORA, train_A=False, init="pissa"),
    },
    "dora": {
        **{i: dataclasses.replace(_DORA, init=i) for i in ("kaiming", "pissa", "pissa_niter_4")},
        "corda": dataclasses.replace(_DORA, init="corda"),
        "frozen A": dataclasses.replace(_DORA, train_A=False),
    },
    "ia3": {"outputs": ls.IA3Config(), "feedforward": ls.IA3Config(feedforward=_INNER)},
    "ia3_ff": {"inputs": ls.IA3FFConfig()},
    "delora": {
        init: ls.DeLoRAConfig(r=4, lambda_init=1.5, init=init) for init in ("zero", "subtract")
    },
    "hra": {"pairs": ls.HRAConfig(r=4), "gram_schmidt": ls.HRAConfig(r=3, gram_schmidt=True)},
    "road": {
        f"road_{n}": ls.RoAdConfig(form=f"road_{n}", group_size=2, targets=_EVEN) for n in (1, 2, 4)
    },
    "vera": {"default": ls.VeRAConfig(r=7, d_initial=0.6)},
    "lora_xs": {
        "svd": ls.LoRAXSConfig(r=3, alpha=6.0),
        "svd_niter_4": ls.LoRAXSConfig(r=3, alpha=6.0, init="svd_niter_4"),
    },
    "subspace": {
        "full": ls.SubspaceConfig(r=3, r_out=4),
        "full, extra": ls.SubspaceConfig(r=3, r_out=2, extra=1),
        "diagonal": ls.SubspaceConfig(form="diagonal", r=4),
        "diagonal, extra": ls.SubspaceConfig(form="diagonal", r=3, extra=1),
        "loadings": ls.SubspaceConfig(form="loadings", r=2, width=2),
        "loadings, extra": ls.SubspaceConfig(form="loadings", r=1, r_out=2, width=2, extra=1),
    },
    "antipasto": {
        "gains": ls.AntiPaSTOConfig(r=4),
        "suppress_only": ls.AntiPaSTOConfig(suppress_only=True),
        "active": ls.AntiPaSTOConfig(r=4, directions="active"),
    },
    "antipasto_corda": {"gains": ls.AntiPaSTOCorDAConfig(r=4)},
    "antipasto_rot": {
        "V": ls.AntiPaSTORotConfig(r=5),
        "both": ls.AntiPaSTORotConfig(r=8, rotate="both", block=3),
    },
    "antipasto_ablate": {
        "one": ls.AntiPaSTOAblateConfig(),
        "two": ls.AntiPaSTOAblateConfig(r=4, k=2, coeff=1.5),
    },
    "antipasto_arrow": {"mixing": ls.AntiPaSTOArrowConfig(block=2)},
    "loha": {"factored": ls.LoHaConfig(r=1, alpha=4.0), "dense": ls.LoHaConfig(r=3, alpha=9.0)},
    "lokr": {
        "low rank": ls.LoKrConfig(r=1, alpha=2.0, decompose_both=True),
        "whole": ls.LoKrConfig(r=4, alpha=8.0, decompose_factor=2, init="lycoris"),
    },
    "oft": {
        "neumann": ls.OFTConfig(block_size=2),
        "exact": ls.OFTConfig(blocks=2, cayley="exact"),
        "shared": ls.OFTConfig(block_size=2, block_share=True, coft=True, eps=0.6),
    },
    "miss": {
        "balance": ls.MiSSConfig(r=4),
        "mini": ls.MiSSConfig(r=3, form="mini", mini_r=2, targets=_EVEN),
        "bat": ls.MiSSConfig(r=2, form="bat", targets=_EVEN),
    },
}
