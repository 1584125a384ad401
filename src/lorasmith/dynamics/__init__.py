"""Rules that act on an adapter while it is trained, in any loop.

``protocol`` says what a rule is, ``driver`` makes rules act in any loop, ``callback`` in
Transformers' Trainer, ``registry`` finds them by name. The driver's rooms are ``rules`` (several
together), ``context`` and ``sites`` (what they act on), ``observing`` (what the model did),
``added_gradients`` and ``processes`` (several processes) and ``carried_state`` (checkpoints).
Every other file is one rule, or a part of the rule whose name it begins with; ``snapshot`` and
``task_adapters`` serve the stress controller.
"""

from __future__ import annotations

from lorasmith.dynamics.context import Context
from lorasmith.dynamics.driver import Dynamics
from lorasmith.dynamics.protocol import Dynamic, Site, Statistics, Step
from lorasmith.dynamics.sites import find_sites

__all__ = [
    "Context",
    "Dynamic",
    "Dynamics",
    "Site",
    "Statistics",
    "Step",
    "find_sites",
]
