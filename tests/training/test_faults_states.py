"""Checkpoints without a pickle: the form of states, and what a run reads of one."""

from __future__ import annotations

import functools
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import TrainingError
from lorasmith.training import checkpoints, trainer
from lorasmith.training.run import train
from lorasmith.training.states import load_state, random_state, save_state, set_random_state
from tests.training.killing import config
from tests.training.tiny import save_tiny, write_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)).map(
        lambda given: torch.ones(given[1]).to(given[0])
    ),
)
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Of the same types, values and shapes, NaN being itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    # Zeros have a sign.
    return bool(one == other) and (not isinstance(one, float) or str(one) == str(other))


@settings(max_examples=60, deadline=None)
@given(state=STATES)
def test_a_state_comes_back_as_it_was(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    save_state(state, path)
    assert same(load_state(path), state)


def test_views_of_one_tensor(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    save_state({"whole": base, "part": base.T[1:], "again": base}, tmp_path / "a")
    found = load_state(tmp_path / "a")
    assert torch.equal(found["part"], base.T[1:])
    assert torch.equal(found["whole"], found["again"])


@pytest.mark.parametrize("value", [object(), print, {1, 2}, b"bytes", 1j, np.ones(2), Path("x")])
def test_what_would_take_a_pickle_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="without a pickle") as caught:
        save_state({"a": [value]}, tmp_path / "a")
    assert caught.value.got == type(value).__name__
    assert not (tmp_path / "a").exists()


def test_random_numbers_go_on_as_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]  # noqa: NPY002

    draw()  # half of a pair of normal numbers is kept
    before = random_state(torch.device("cpu"))
    save_state(before, tmp_path / "a")
    wanted = draw() + draw()
    set_random_state(load_state(tmp_path / "a"), torch.device("cpu"))
    assert draw() + draw() == wanted


def test_a_run_writes_and_reads_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamics, early stopping and a resume; under the audit hook."""
    base, rows = save_tiny(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    seen: list[str] = []
    on = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in ("pickle.find_class", "marshal.load", "os.system", "subprocess.Popen"):
            seen.append(f"{event} {arguments}")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    made = functools.partial(
        config, base, rows, tmp_path / "out", eval_data=str(rows), eval_steps=2, early_stopping=9
    )
    made = functools.partial(made, save_steps=2, save_total_limit=9, eval_limit=4, warmup=0.0)
    train(made(steps=2), progress=False)
    sys.addaudithook(hook)
    try:
        with monkeypatch.context() as patch:
            for name in ("save", "load"):
                patch.setattr(torch, name, refuse)
            train(made(steps=4, changed="accept"), progress=False)
    finally:
        on = False
    assert seen == []
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    names = {p.name for p in files if p.parent.name == "checkpoint-4"}
    assert {*checkpoints.REQUIRED, "rng_state.safetensors", "best_state.safetensors"} <= names
    for path in files:
        assert path.suffix in (".json", ".safetensors", ".md"), path
        # Neither the archive of torch.save nor a pickle itself.
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path


def test_a_checkpoint_of_pickles_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "RAN"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", *checkpoints.REQUIRED):
        torch.save({"state": Code()}, folder / name)
    with pytest.raises(TrainingError) as caught:
        checkpoints.choose_checkpoint("last", tmp_path)
    assert "rng_state.safetensors is missing" in str(caught.value.got)
    with pytest.raises(TrainingError) as caught:
        load_state(folder / "optimizer.safetensors")
    assert caught.value.file == str(folder / "optimizer.safetensors")
    assert caught.value.key == "optimizer.safetensors"
    assert not (tmp_path / "RAN").exists()


def test_the_best_is_no_evaluation_that_is_not_finite() -> None:
    """It would stay the best for ever, and no checkpoint could be written."""
    run: Any = SimpleNamespace(
        run_config=SimpleNamespace(early_stopping=3),
        state=SimpleNamespace(global_step=1),
        best=None,
        best_state=None,
        best_dynamics=None,
        evaluations_since_best=0,
        adapter=SimpleNamespace(state_dict=dict),
        driver=None,
    )
    consider = trainer.AdapterTrainer.consider
    found = [(consider(run, loss), run.best) for loss in (math.nan, 2.0, math.inf)]
    assert found == [(False, None), (False, (1, 2.0)), (False, (1, 2.0))]
