"""How low-rank factors start. One file each; this is the list.

An initialisation is a function of the rank and the scaling, and, as it declares, of the
layer's weight W [d_out, d_in] and of statistics of calibration data. It gives A and B and
says whether it *takes over* part of W: then the adapted layer acts with
W + s (B A − B0 A0), B0 A0 being the initial product, which is what moving the base weight to
W − s B0 A0 would give. The base weight itself is never written, so that the model is restored
exactly, other adapters see the base they were made for, and quantised and shared weights
need no special case.

None is needed to load an adapter: what it made is in the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorasmith.errors import ConfigError, UnknownNameError
from lorasmith.init.corda import CorDA
from lorasmith.init.eva import EVA
from lorasmith.init.gaussian import Gaussian
from lorasmith.init.kaiming import Kaiming
from lorasmith.init.loftq import LoftQ
from lorasmith.init.lora_ga import LoRAGA
from lorasmith.init.olora import OLoRA
from lorasmith.init.orthogonal import Orthogonal
from lorasmith.init.pissa import PiSSA
from lorasmith.init.types import Initialisation, Shape, Start

__all__ = ["INITIALISATIONS", "Initialisation", "Shape", "Start", "get_initialisation"]

#: Name → class. A user's own may be added.
INITIALISATIONS: dict[str, type[Initialisation]] = {
    kind.name: kind
    for kind in (Kaiming, Gaussian, Orthogonal, PiSSA, OLoRA, EVA, CorDA, LoRAGA, LoftQ)
}

_NITER = re.compile(r"pissa_niter_(\d+)")


def get_initialisation(
    name: str, options: Mapping[str, Any] = MappingProxyType({})
) -> Initialisation:
    """The initialisation of that name; ``pissa_niter_N`` is PiSSA by randomised SVD.

    Args:
        name: Its name.
        options: Its options, by name; what is left out takes its default.

    Raises:
        UnknownNameError: If there is none of that name.
        ConfigError: If it does not take one of the options.
    """
    randomised = _NITER.fullmatch(name)
    if randomised is not None:
        if "iterations" in options:
            raise ConfigError(
                "The number of iterations is in the name already.",
                expected="init='pissa' with init_options={'iterations': N}",
                got=f"{name} with iterations={options['iterations']!r}",
                key="init_options",
            )
        return PiSSA.from_options({**options, "iterations": int(randomised.group(1))})
    if name not in INITIALISATIONS:
        near = difflib.get_close_matches(name, INITIALISATIONS, n=1)
        raise UnknownNameError(
            f"There is no initialisation named {name!r}.",
            expected=", ".join([*INITIALISATIONS, "pissa_niter_<n>"]),
            got=name,
            fix=f"did you mean {near[0]!r}?" if near else None,
            key="init",
        )
    return INITIALISATIONS[name].from_options(options)
