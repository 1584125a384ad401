"""``lorasmith fleet`` with nothing, one adapter, and adapters that do nothing; bars; ids.

Whatever is asked: one JSON object on stdout and nothing else, and exit code 0 or 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from tests.io.support import llama, saved


@pytest.fixture
def fleets(tmp_path: Path) -> Path:
    """``one``: an adapter; ``still``: two that do nothing; ``mixed``: four and one of those."""
    saved(tmp_path / "one" / "a", ls.LoRAConfig(r=3))
    for name, r in (("y", 3), ("z", 2)):
        model = llama()
        ls.attach(model, ls.LoRAConfig(r=r))
        ls.save(model, tmp_path / "still" / name)
        if name == "z":
            ls.save(model, tmp_path / "mixed" / name)
    for name, r in zip("abcd", (2, 3, 4, 2), strict=True):
        saved(tmp_path / "mixed" / name, ls.LoRAConfig(r=r))
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(folder: Path) -> list[str]:
    """The adapters in it; beside them are the locks of their writers."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def done(call: Any, *arguments: str | Path) -> Any:
    called = call(*arguments, "--json")
    assert called.code == 0, (arguments, called.out, called.err)
    assert "warning" not in called.err
    assert "error" not in called.json  # failed calls have that, and no other
    return called.json


def refused(call: Any, *arguments: str | Path) -> Any:
    called = call(*arguments, "--json")
    assert called.code == 2, (arguments, called.out)
    assert list(called.json) == ["error"]
    return called.json["error"]


@pytest.mark.parametrize("basis", ["joint", "share"])
@pytest.mark.parametrize("which", ["one", "still", "mixed"])
def test_small_and_still_fleets(call: Any, fleets: Path, which: str, basis: str) -> None:
    adapters, fleet = fleets / which, fleets / "fleet"
    ids = names(adapters)
    assert [a["id"] for a in done(call, "fleet", "info", adapters)["adapters"]] == ids
    assert done(call, "fleet", "validate", adapters)["ok"]
    found = done(call, "fleet", "analyze", adapters, "--per-layer", "--plot", fleets / "plots")
    assert sum(len(g) for g in found["clusters"]["groups"]) == len(ids)
    assert all(Path(p).stat().st_size for p in found["plots"])
    assert [o["id"] for o in found["outliers"]["outliers"]] == (["z"] if which == "mixed" else [])
    made = done(call, "fleet", "compress", adapters, "-o", fleet, "--basis", basis)
    assert max(made["errors"].values()) <= 0.05
    assert done(call, "fleet", "info", fleet)["ids"] == ids
    assert set(done(call, "fleet", "analyze", adapters, "--subspace", fleet)["coverage"]) == {*ids}
    done(call, "fleet", "add", fleet, fleets / "still" / "y", "--id", "new")
    done(call, "fleet", "add", fleet, fleets / "still" / "z", "--id", "newer", "--absorb")
    exported = done(call, "fleet", "export", fleet, "new", "-o", fleets / "out")
    assert exported["errors"] == {"new": 0.0}
    for name in (*ids, "new", "newer"):
        done(call, "fleet", "remove", fleet, name)
    # Nobody is left, and a fleet of nobody is one.
    assert done(call, "fleet", "info", fleet)["ids"] == []
    assert done(call, "fleet", "validate", fleet)["ok"]
    for command in ("analyze", "benchmark"):
        assert refused(call, "fleet", command, fleet)["message"] == "There is no adapter."
    assert refused(call, "fleet", "export", fleet, "new", "-o", fleets / "x")["expected"] == (
        "there is none"
    )
    done(call, "fleet", "add", fleet, fleets / "one" / "a", "--absorb")
    assert done(call, "fleet", "info", fleet)["ids"] == ["a"]


@pytest.mark.parametrize("which", ["one", "still", "mixed"])
def test_small_and_still_fleets_benchmarked_merged_and_compared(
    call: Any, fleets: Path, which: str
) -> None:
    adapters = fleets / which
    options = ["--error", "0.1", "--quantize", "none,8", "--plot", fleets / "frontier.png"]
    assert done(call, "fleet", "benchmark", adapters, *options)["settings"]
    for method in ("linear", "ties", "karcher", "knots"):
        done(call, "merge", adapters, "-o", fleets / f"merged-{method}", "--method", method)
    first = adapters / names(adapters)[0]
    found = done(call, "fleet", "diff", fleets / "still" / "z", first)
    assert found["norm_a"] == 0
    assert found["cosine"] is None


def test_nothing_is_said_to_be_nothing(call: Any, fleets: Path) -> None:
    empty, out = fleets / "empty", fleets / "out"
    for arguments in (
        ("fleet", "info", empty),
        ("fleet", "analyze", empty),
        ("fleet", "compress", empty, "-o", out),
        ("fleet", "compress", empty, "-o", out, "--stream"),
        ("fleet", "benchmark", empty),
        ("merge", empty, "-o", out),
        ("fleet", "add", empty, fleets / "one" / "a"),
    ):
        refused(call, *arguments)
    called = call("fleet", "validate", empty, "--json")
    assert (called.code, called.json["ok"], called.json["problems"]) == (1, False, 1)
    assert not out.exists()


def test_an_unknown_id_leads_to_the_one_that_was_meant(call: Any, fleets: Path) -> None:
    fleet = fleets / "fleet"
    for name in ("Dates-EN", "team/sums"):
        done(call, "fleet", "compress", fleets / "one", "-o", fleet, "--overwrite")
        done(call, "fleet", "add", fleet, fleets / "still" / "y", "--id", name)
        meant = name.lower()[:-1]
        for arguments in (("export", fleet, meant, "-o", fleets / "x"), ("remove", fleet, meant)):
            assert refused(call, "fleet", *arguments)["fix"] == f"did you mean {name!r}?"
        wrong = ["--model", "m", "--examples", f"{meant}=rows.jsonl"]
        assert refused(call, "fleet", "route", fleet, *wrong)["fix"] == f"did you mean {name!r}?"


def test_a_directory_of_several_is_not_an_adapter_to_add(call: Any, fleets: Path) -> None:
    """With --absorb it was "too many values to unpack"."""
    done(call, "fleet", "compress", fleets / "one", "-o", fleets / "fleet")
    for more in ([], ["--absorb"]):
        found = refused(call, "fleet", "add", fleets / "fleet", fleets / "mixed", *more)
        assert "several adapters" in found["message"]
        assert done(call, "fleet", "info", fleets / "fleet")["ids"] == ["a"]


@pytest.mark.parametrize("basis", ["joint", "share"])
@pytest.mark.parametrize("how", ["compress", "stream", "add", "absorb", "analyze", "info"])
def test_there_is_a_bar(
    call: Any, fleets: Path, basis: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every phase, up to its end."""
    fleet, mixed = fleets / "fleet", fleets / "mixed"
    done(
        call, "fleet", "compress", fleets / "one", "-o", fleet, "--basis", basis, "--quantize", "8"
    )
    seen: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def bar(console: Any, *, shown: bool = True, **_: Any) -> Iterator[Any]:
        yield (lambda phase, n, of: seen.setdefault(phase, []).append((n, of))) if shown else None

    monkeypatch.setattr("lorasmith.progress.bar", bar)
    arguments: list[str | Path] = {
        "compress": ["compress", mixed, "-o", fleets / "x", "--basis", basis],
        "stream": ["compress", mixed, "-o", fleets / "x", "--basis", basis, "--stream"],
        "add": ["add", fleet, mixed / "b"],
        "absorb": ["add", fleet, mixed / "b", "--absorb"],
        "analyze": ["analyze", mixed, "--subspace", fleet],
        "info": ["info", mixed],
    }[how]
    called = call("fleet", *arguments, "--json")
    assert called.code == 0
    assert called.json
    assert seen
    for phase, steps in seen.items():
        assert steps[-1][0] == steps[-1][1] > 0, phase
        assert [n for n, _ in steps] == sorted(n for n, _ in steps)
    if how == "absorb":
        assert "rounding" in seen
        assert len(seen) == 3
    if how == "analyze":
        assert {"similarity", "coverage"} <= set(seen)
    seen.clear()
    if how == "absorb":
        done(call, "fleet", "add", fleet, mixed / "c", "--absorb", "--quiet")
        assert not seen


@pytest.mark.filterwarnings("always::lorasmith.fleet.records.BudgetWarning")
@pytest.mark.parametrize("basis", ["joint", "share"])
def test_a_fleet_that_is_compressed_again_has_lost_what_it_had_lost(
    call: Any, fleets: Path, basis: str
) -> None:
    """It said what it had lost of what was left, less than what it had really lost."""
    pytest.importorskip("peft")
    from tests.fleet.of_peft import dense, distance

    first, again = fleets / "first", fleets / "again"
    done(
        call, "fleet", "compress", fleets / "mixed", "-o", first, "--basis", basis, "--error", "0.1"
    )
    called = call(
        "fleet", "compress", first, "-o", again, "--error", "0.1", "--quantize", "8", "--json"
    )
    assert called.code == 0
    assert "lose more than 0.1" in called.err
    told = called.json["errors"]
    assert done(call, "fleet", "info", again)["errors"] == pytest.approx(told, rel=1e-3)
    assert told["z"] == 0
    before = done(call, "fleet", "info", first)["errors"]
    for name in "abcd":
        call("fleet", "export", again, name, "-o", fleets / "out" / name, "--rank", "exact")
        true = distance(dense(fleets / "out" / name), dense(fleets / "mixed" / name))
        assert before[name] < true <= told[name] < 0.45


def test_sizes_are_three_figures() -> None:
    from lorasmith.cli.fleet import _size

    shown = [_size(n) for n in (0, 999, 1000, 12_345, 999_499, 999_700, 999_999_999)]
    assert shown == ["0 B", "999 B", "1 kB", "12.3 kB", "999 kB", "1 MB", "1 GB"]  # "1e+03 kB"
