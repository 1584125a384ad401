"""The registry: registering, refusing, and variants of installed packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import lorasmith as ls
from lorasmith.adapters.ia3_ff import IA3FF, IA3FFConfig
from lorasmith.core import registry
from lorasmith.errors import ConfigError, UnknownNameError
from tests.models import mlp


@dataclass(frozen=True, kw_only=True)
class MineConfig(IA3FFConfig):
    variant: ClassVar[str] = "mine"


class Mine(IA3FF):
    name = "mine"
    config_class = MineConfig


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    ls.variants()  # reads the real entry points first
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))


def test_a_variant_of_the_users_own() -> None:
    with pytest.raises(UnknownNameError, match="mine"):
        ls.attach(mlp(), MineConfig())
    variant = ls.register(Mine())
    assert ls.variants()["mine"] is variant
    model = mlp()
    ls.attach(model, MineConfig())
    model(torch.randn(2, 6)).sum().backward()
    assert ls.register(variant) is variant  # again is no error: modules are imported twice
    with pytest.raises(ConfigError, match="registered already"):
        ls.register(Mine())
    again = Mine()
    assert ls.register(again, replace=True) is again
    assert ls.variants()["mine"] is again


def test_contradicting_names() -> None:
    class Liar(Mine):
        name = "liar"

    with pytest.raises(ConfigError, match="disagree"):
        ls.register(Liar())
    assert "liar" not in ls.variants()


def test_the_view_is_read_only_and_unknown_names_get_a_hint() -> None:
    with pytest.raises(TypeError):
        ls.variants()["x"] = Mine()  # type: ignore[index]
    with pytest.raises(UnknownNameError) as caught:
        ls.config_from_dict({"variant": "dorra"})
    assert caught.value.fix == "did you mean 'dora'?"
    with pytest.raises(ConfigError, match="not an adapter configuration"):
        ls.attach(mlp(), {"r": 8})  # type: ignore[arg-type]


@pytest.mark.parametrize("as_class", [True, False])
def test_entry_points(monkeypatch: pytest.MonkeyPatch, as_class: bool) -> None:
    class Entry:
        name = "mine"

        def load(self) -> Any:
            return Mine if as_class else Mine()

    groups: list[str] = []

    def entry_points(*, group: str) -> list[Entry]:
        groups.append(group)
        return [Entry()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_entry_points_read", False)
    assert isinstance(ls.variants()["mine"], Mine)
    ls.variants()
    assert groups == ["lorasmith.variants"]
