"""The adapter engine: what is common to every variant.

``config`` and ``variant`` say what a variant is, ``layers`` and ``targets`` which layers
it can sit on, ``state`` and ``hooks`` how it acts, ``attach`` and ``fusing`` how it comes
and goes, ``lowrank`` how its products are computed, ``factors`` how others read it.
"""
