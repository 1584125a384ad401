"""How low-rank factors start. One file each; this is the list.

An initialisation is a function of the layer's weight W [d_out, d_in], the rank and the
scaling. It gives A and B and says whether it *takes over* part of W: then the adapted
layer acts with W + s (B A − B0 A0), B0 A0 being the initial product, which is what moving
the base weight to W − s B0 A0 would give. The base weight itself is never written, so
that the model is restored exactly, other adapters see the base they were made for, and
quantised and shared weights need no special case.
"""

from __future__ import annotations

import difflib
import re

from lorasmith.errors import UnknownNameError
from lorasmith.init.gaussian import gaussian
from lorasmith.init.kaiming import kaiming
from lorasmith.init.pissa import pissa
from lorasmith.init.types import Initialisation, Start

__all__ = ["INITIALISATIONS", "Initialisation", "Start", "get_initialisation"]

INITIALISATIONS: dict[str, Initialisation] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
}

_NITER = re.compile(r"pissa_niter_(\d+)")


def get_initialisation(name: str) -> Initialisation:
    """The initialisation of that name; ``pissa_niter_N`` is PiSSA by randomised SVD.

    Raises:
        UnknownNameError: If there is none.
    """
    randomised = _NITER.fullmatch(name)
    if randomised is not None:
        iterations = int(randomised.group(1))
        return lambda weight, shape, rank, scaling: pissa(
            weight, shape, rank, scaling, iterations=iterations
        )
    if name not in INITIALISATIONS:
        near = difflib.get_close_matches(name, INITIALISATIONS, n=1)
        raise UnknownNameError(
            f"There is no initialisation named {name!r}.",
            expected=", ".join([*INITIALISATIONS, "pissa_niter_<n>"]),
            got=name,
            fix=f"did you mean {near[0]!r}?" if near else None,
            key="init",
        )
    return INITIALISATIONS[name]
