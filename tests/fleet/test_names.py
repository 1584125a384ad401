"""What is exported is what it is called, and ids that do not exist lead to those that do."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import lorasmith as ls
from lorasmith import fleet
from lorasmith.errors import UnknownNameError
from tests.fleet.fleets import adapter


def test_no_module_takes_the_place_of_a_function() -> None:
    """``from lorasmith.fleet import clusters, similarity`` gave a module, which is not callable."""
    for found in pkgutil.iter_modules(fleet.__path__, "lorasmith.fleet."):
        importlib.import_module(found.name)
    for package in (ls, fleet):
        for name in package.__all__:
            assert not isinstance(getattr(package, name), ModuleType), name
    assert fleet.similarity is ls.similarity


def test_unknown_ids_lead_to_those_spelt_alike() -> None:
    ids = [f"customer-{n}/invoices" for n in range(9)] + ["Dates-EN"]
    held = ls.SharedSubspace.from_adapters({n: adapter(1, seed=i) for i, n in enumerate(ids)})
    for call in (held.remove, held.reconstruct, held.record, held.rest, held.factors):
        with pytest.raises(UnknownNameError) as caught:
            call("dates-en")
        assert caught.value.got == "'dates-en'"
        assert caught.value.fix == "did you mean 'Dates-EN'?"
        assert caught.value.expected is not None
        assert caught.value.expected.endswith("(10)")
    with pytest.raises(UnknownNameError, match="customer-3/invoices"):
        held.remove("customer-3/invoice")
    with pytest.raises(UnknownNameError) as caught:
        held.remove("zzzzzz")
    assert caught.value.fix is None
    assert held.ids == tuple(ids)
    similar = ls.similarity({n: adapter(1, seed=i) for i, n in enumerate(ids[-2:])})
    with pytest.raises(UnknownNameError, match="did you mean 'Dates-EN'"):
        similar.nearest("dates-en")
    for name in ids:
        held.remove(name)
    with pytest.raises(UnknownNameError, match="there is none"):
        held.reconstruct("dates-en")
