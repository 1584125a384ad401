"""Several tasks in one run: where they come from, how batches are made, what is reported."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import ConfigError, DataError
from lorasmith.training.calibration import calibration_batches
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.data import (
    choose_task_column,
    first_rows,
    load_rows,
    split_rows,
    task_sources,
    tokenise,
)
from lorasmith.training.evaluate import evaluate
from lorasmith.training.models import load_model
from lorasmith.training.order import RowOrder, epoch_rows
from lorasmith.training.run import train
from tests.training.tiny import ROWS, make_config, make_tokenizer, write_rows

TASKS = [{**row, "task": "long" if i % 3 == 0 else "short"} for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", TASKS)


def _run(base: Path, data: Any, output: Path, **changes: Any) -> Any:
    return train(make_config(base, data, output, **changes), progress=False)


# -- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("builtin:dates-en", None),
        ("data/a.jsonl", None),
        ("owner/name:config", None),
        (
            "d=builtin:dates-en,n=builtin:numbers-en",
            {"d": "builtin:dates-en", "n": "builtin:numbers-en"},
        ),
        (
            "builtin:dates-en, x/b.v2.jsonl",
            {"dates-en": "builtin:dates-en", "b.v2": "x/b.v2.jsonl"},
        ),
        ("only=a.jsonl", {"only": "a.jsonl"}),
        ("owner/one,owner/two:config", {"one": "owner/one", "config": "owner/two:config"}),
        ("shards/year=2024/a.jsonl", None),  # no name has a slash
    ],
)
def test_sources_of_several_tasks(source: str, expected: dict[str, str] | None) -> None:
    assert task_sources(source) == expected


@pytest.mark.parametrize("source", ["a=x.jsonl,a=y.jsonl", "x/a.jsonl,y/a.jsonl", "a=,b=x", "a,,b"])
def test_sources_that_cannot_be_told_apart(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_sources(source)
    assert caught.value.key == "data"


def test_a_file_may_have_a_comma_or_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a=1,b.jsonl")
    assert task_sources(str(path)) is None
    assert len(load_rows(str(path))) == len(ROWS)


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b", "task": "old"}])
    two = write_rows(tmp_path / "two.jsonl", [{"question": "c", "answer": "d"}] * 2)
    found = load_rows(f"first={one},{two}")
    assert found["task"] == ["first", "two", "two"]
    assert found["prompt"] == ["a", None, None]
    tokens = tokenise(found, make_tokenizer(), task_column="task")
    assert tokens["task"] == ["first", "two", "two"]
    built = load_rows("builtin:dates-en,n=builtin:numbers-en", limit=3)
    assert built["task"] == ["dates-en"] * 3 + ["n"] * 3
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": ["x"], "completion": "b"}\n')
    with pytest.raises(DataError, match="different types"):
        load_rows(f"{one},{bad}")


def test_the_task_stays_with_its_row() -> None:
    """Rows that are dropped, cut into pieces or unfolded do not shift the others' tasks."""
    data = Dataset.from_list(
        [
            {"prompt": "Count", "completion": "1 2 3", "task": "a"},
            {"prompt": "Count " * 40, "completion": "1", "task": "dropped"},
            {"prompt": "Count", "completion": "4 5", "task": "b"},
        ]
    )
    with pytest.warns(UserWarning, match="dropped"):
        tokens = tokenise(data, make_tokenizer(), max_length=100, task_column="task")
    assert tokens["task"] == ["a", "b"]
    texts = Dataset.from_list([{"text": "x" * 100, "task": 7}, {"text": "y", "task": 8}])
    pieces = tokenise(texts, make_tokenizer(), max_length=30, task_column="task")
    assert pieces["task"][-1] == "8"
    assert len(pieces) > 3
    assert set(pieces["task"][:-1]) == {"7"}
    unfolded = Dataset.from_list(
        [
            {
                "instruction": "do",
                "instances": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}],
                "kind": "k",
            },
        ]
    )
    assert tokenise(unfolded, make_tokenizer(), task_column="kind")["task"] == ["k", "k"]


def test_a_row_without_a_task_is_named() -> None:
    data = Dataset.from_list([{"text": "a", "task": "x"}, {"text": "b", "task": None}])
    with pytest.raises(DataError, match="Row 1 has no task"):
        tokenise(data, make_tokenizer(), task_column="task")
    with pytest.raises(DataError, match="no column 'tsk'") as caught:
        tokenise(data, make_tokenizer(), task_column="tsk")
    assert caught.value.fix == "did you mean 'task'?"


def test_which_column_is_the_task(caplog: pytest.LogCaptureFixture) -> None:
    few = Dataset.from_dict({"text": ["a"] * 3, "task": ["x", "y", "x"], "kind": ["p", "q", "r"]})
    many = Dataset.from_dict({"text": ["a"] * 65, "task": [str(i) for i in range(65)]})
    assert choose_task_column("auto", few) == "task"
    assert choose_task_column("kind", few) == "kind"
    assert choose_task_column("none", few) is None
    assert choose_task_column("auto", few.remove_columns("task")) is None
    assert choose_task_column("task", many) == "task"
    with caplog.at_level(logging.WARNING, "lorasmith"):
        assert choose_task_column("auto", many) is None
    assert "65 values" in caplog.text


def test_every_task_is_held_out_in_part() -> None:
    data = Dataset.from_dict(
        {"text": [str(i) for i in range(46)], "task": ["a"] * 40 + ["b"] * 5 + ["c"]}
    )
    kept, held = split_rows(data, fraction=0.2, by="task")
    assert Counter(held["task"]) == {"a": 8, "b": 1}
    assert Counter(kept["task"]) == {"a": 32, "b": 4, "c": 1}
    assert sorted([*kept["text"], *held["text"]]) == sorted(data["text"])
    assert split_rows(data, fraction=0.2)[1]["text"] == split_rows(data, fraction=0.2)[1]["text"]


def test_the_first_rows_are_of_all_tasks() -> None:
    data = Dataset.from_dict({"task": ["a"] * 5 + ["b"] * 3})
    assert first_rows(data, 4) == [0, 1, 5, 6]
    assert first_rows(data, 100) == list(range(8))
    assert first_rows(data.rename_column("task", "x"), 3) == [0, 1, 2]


def test_calibration_sees_all_tasks(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "r.jsonl", sorted(TASKS, key=lambda r: r["task"]))
    options = AdapterOptions(r=2, init="eva")
    config = TrainConfig(str(base), str(data), output=tmp_path, adapter=options, calibration_rows=4)
    tokenizer = make_tokenizer()
    tokens = tokenise(load_rows(str(data)), tokenizer, task_column="task")
    batches = calibration_batches(config, options.to_config(), tokenizer, tokens)
    assert batches is not None
    seen = {
        tuple(ids[m.bool()].tolist())
        for b in batches
        for ids, m in zip(b["input_ids"], b["attention_mask"], strict=True)
    }
    by_task = Counter(row["task"] for row in tokens if tuple(row["input_ids"]) in seen)
    assert by_task == {"long": 2, "short": 2}


# -- the order ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
)
def test_batches_are_of_one_task_and_hold_every_row(
    tasks: list[str], size: int, epoch: int, grouped: bool
) -> None:
    lengths = [7 * i % 11 + 1 for i in range(len(tasks))] if grouped else None
    order = RowOrder(lengths, len(tasks), size, 3, lambda: epoch, tasks)
    found = list(order)
    assert found == list(order)
    assert len(found) == len(order) == epoch_rows(len(tasks), tasks, size)
    assert len(found) % size == 0
    batches = [found[i : i + size] for i in range(0, len(found), size)]
    assert all(len({tasks[i] for i in batch}) == 1 for batch in batches)
    counts = Counter(found)
    assert set(counts) == set(range(len(tasks)))
    for task, number in Counter(tasks).items():
        times = [counts[i] for i in range(len(tasks)) if tasks[i] == task]
        # As evenly as may be: only what fills up the last batch comes once more.
        assert sum(times) == -(-number // size) * size
        assert max(times) - min(times) <= 1


def test_tasks_take_turns() -> None:
    tasks = ["a"] * 40 + ["b"] * 40
    order = list(RowOrder(None, 80, 4, 0, lambda: 0, tasks))
    turns = [tasks[i] for i in order[::4]]
    assert all(x != y for x, y in pairwise(turns))
    # Three times the rows: in any four turns in a row, three are its own, give or take one.
    tasks = ["a"] * 60 + ["b"] * 20
    order = list(RowOrder(None, 80, 4, 0, lambda: 0, tasks))
    turns = [tasks[i] for i in order[::4]]
    assert all(2 <= turns[i : i + 4].count("a") <= 4 for i in range(17))
    other = list(RowOrder(None, 80, 4, 0, lambda: 1, tasks))
    assert other != order
    assert list(RowOrder(None, 80, 4, 1, lambda: 0, tasks)) != order


def test_without_tasks_every_row_comes_once() -> None:
    for lengths in (None, list(range(10))):
        assert sorted(RowOrder(lengths, 10, 4, 0, lambda: 0)) == list(range(10))


# -- the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["on", "off"])
def test_losses_are_reported_for_each_task(
    base: Path, rows: Path, tmp_path: Path, packing: Any
) -> None:
    """Those of the first step, before anything is learned, against the full computation."""
    model, tokenizer = load_model(base, device="cpu")
    sums: dict[str, tuple[float, int]] = {}
    tokens = tokenise(load_rows(str(rows)), tokenizer, task_column="task")
    for row in tokens:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        each = F.cross_entropy(logits, labels, reduction="none")[labels != -100]
        total, count = sums.get(row["task"], (0.0, 0))
        sums[row["task"]] = (total + float(each.detach().sum()), count + len(each))
    expected = {task: total / count for task, (total, count) in sums.items()}
    overall = sum(t for t, _ in sums.values()) / sum(c for _, c in sums.values())
    # 8 and 16 rows: two batches of 8 and one of 8, so one step sees every row once.
    assert Counter(tokens["task"]) == {"long": 8, "short": 16}
    result = _run(
        *(base, rows, tmp_path / "o"),
        steps=1,
        batch_size=8,
        gradient_accumulation=3,
        packing=packing,
        eval_data=str(rows),
        lr=1e-9,
    )
    (point,) = result.losses
    assert point.tasks == pytest.approx(expected, rel=1e-5)
    assert point.loss == pytest.approx(overall, rel=1e-5)
    (held,) = result.evaluations
    assert held.tasks == pytest.approx(expected, rel=1e-5)
    assert held.loss == pytest.approx(overall, rel=1e-5)
    written = json.loads((tmp_path / "o" / "training.json").read_text())
    assert written["losses"][0]["tasks"] == point.tasks
    assert written["evaluations"][0]["tasks"] == held.tasks


def test_each_batch_of_the_run_is_of_one_task(
    base: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lorasmith"):
        result = _run(base, rows, tmp_path / "o", steps=None, epochs=2)
    assert "one of 2 tasks: long (8 rows), short (16 rows)" in caplog.text
    assert result.steps == 2 * 6
    seen = [tuple(point.tasks) for point in result.losses]
    assert all(len(names) == 1 for names in seen)
    assert Counter(seen) == {("long",): 4, ("short",): 8}
    assert all(p.loss == pytest.approx(next(iter(p.tasks.values()))) for p in result.losses)
    # Fewer rows than a batch: filled up, not left out, and no reason to fail.
    small = _run(base, rows, tmp_path / "p", steps=None, epochs=1, batch_size=12)
    assert small.steps == 3


def test_tasks_can_be_left_out_or_be_another_column(base: Path, rows: Path, tmp_path: Path) -> None:
    plain = _run(base, rows, tmp_path / "o", task_column="none")
    assert all(point.tasks == {} for point in plain.losses)
    same = _run(base, write_rows(tmp_path / "x.jsonl"), tmp_path / "p")
    assert [p.loss for p in plain.losses] == [p.loss for p in same.losses]
    kinds = write_rows(
        tmp_path / "k.jsonl", [{**row, "kind": row["task"].upper()} for row in TASKS]
    )
    found = _run(base, kinds, tmp_path / "q", task_column="kind")
    assert {name for point in found.losses for name in point.tasks} == {"LONG", "SHORT"}
    with pytest.raises(DataError, match="no column 'nope'"):
        _run(base, rows, tmp_path / "r", task_column="nope")


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_run_with_tasks_resumes_bit_for_bit(
    base: Path, rows: Path, tmp_path: Path, packing: Any
) -> None:
    options: dict[str, Any] = {"steps": 11, "save_steps": 7, "eval_split": 0.2, "packing": packing}
    whole = _run(base, rows, tmp_path / "whole", **options)
    _run(base, rows, tmp_path / "part", **options)
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    resumed = _run(base, rows, tmp_path / "part", **options, resume="last")
    for one, two in zip(resumed.losses, whole.losses, strict=True):
        assert (one.loss, one.tasks, one.grad_norm) == (two.loss, two.tasks, two.grad_norm)
    assert [e.tasks for e in resumed.evaluations] == [e.tasks for e in whole.evaluations]
    name = "adapter_model.safetensors"
    first, second = (tmp_path / folder / name for folder in ("whole", "part"))
    assert first.read_bytes() == second.read_bytes()


# -- evaluation --------------------------------------------------------------------------------


def test_evaluate_reports_each_task(base: Path) -> None:
    model, tokenizer = load_model(base, device="cpu")
    whole = evaluate(model, tokenizer, TASKS, batch_size=5)
    assert list(whole.tasks) == ["long", "short"]
    for task, found in whole.tasks.items():
        alone = evaluate(model, tokenizer, ROWS_OF[task], batch_size=3)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert (found.rows, found.tokens) == (alone.rows, alone.tokens)
        assert (found.matched, found.generated) == (alone.matched, alone.generated)
    plain = evaluate(model, tokenizer, ROWS, batch_size=5)
    assert plain.tasks == {}
    assert whole.loss == pytest.approx(plain.loss, rel=1e-5)
    assert whole.examples == plain.examples
    assert evaluate(model, tokenizer, TASKS, exact_match=False, task_column=None).tasks == {}
    json.dumps(whole.to_dict(), allow_nan=False)


ROWS_OF = {
    name: [{k: v for k, v in row.items() if k != "task"} for row in TASKS if row["task"] == name]
    for name in ("long", "short")
}
