"""The data sets made on the fly: their contents, their splits, their errors."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
from typing import Any

import pytest

from lorasmith.errors import ConfigError, DataError, MissingDependencyError, UnknownNameError
from lorasmith.training import builtin
from lorasmith.training.builtin import SPLITS, builtin_names, load_builtin


def _written(prompt: str) -> str:
    return prompt.split(": ", 1)[1]


def test_english_dates_read_back_by_another_parser() -> None:
    rows = load_builtin("dates-en", "train", 400)
    assert rows.column_names == ["prompt", "completion"]
    shapes = set()
    for row in rows:
        written = _written(row["prompt"]).replace("Sept ", "Sep ")
        weekday, rest = re.fullmatch(r"(?:(\w+), )?(\w+ \d+, \d{4})", written).groups()  # type: ignore[union-attr]
        month = "%b" if len(rest.split()[0]) == 3 else "%B"
        day = dt.datetime.strptime(rest, f"{month} %d, %Y").date()
        assert day.isoformat() == row["completion"]
        assert 1900 <= day.year <= 2099
        if weekday:
            assert day.strftime("%A").startswith(weekday)
        shapes.add((weekday and len(weekday) > 3, month))
    assert len(shapes) >= 4  # full, long, medium, and medium with the weekday


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("dates-de", r"(\w+\.?, )?\d{1,2}\. ?(\w+\.? |\d\d\.)\d{4}"),
        ("dates-fr", r"(\w+\.? )?\d{1,2} [\w.]+ \d{4}"),
        ("dates-es", r"(\w+, )?\d{1,2} (de )?\w+ (de )?\d{4}"),
        ("dates-ja", r"\d{4}[年/]\d{1,2}[月/]\d{1,2}日?.*"),
    ],
)
def test_other_locales_write_their_own_way(name: str, pattern: str) -> None:
    for row in load_builtin(name, "test", 50):
        written = _written(row["prompt"])
        assert re.fullmatch(pattern, written), written
        year, _, day = row["completion"].split("-")
        assert year in written
        assert str(int(day)) in written


def test_every_locale_has_formats_that_fix_the_date() -> None:
    """Three days a locale: the numbers of the day and the year can be read off each."""
    for name in builtin_names()[::40]:
        if name.startswith("dates-"):
            for row in load_builtin(name, "train", 3):
                assert row["completion"][:4] in row["prompt"], (name, row)


def test_numbers_are_what_num2words_says() -> None:
    import num2words

    rows = load_builtin("numbers-es", "train", 200)
    digits = set()
    for row in rows:
        assert row["prompt"].startswith("Write this number in words, in Spanish: ")
        value = int(_written(row["prompt"]))
        assert row["completion"] == num2words.num2words(value, lang="es")
        digits.add(len(str(value)))
    assert digits == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", [n for n in builtin_names() if n.startswith("numbers-")])
def test_every_language_can_count(name: str) -> None:
    for row in load_builtin(name, "test", 60):
        assert row["completion"] == row["completion"].strip() != ""


def _values(name: str, split: str, n: int, seed: int) -> list[str]:
    rows = load_builtin(name, split, n, seed)
    return [r["completion"] if name.startswith("dates") else _written(r["prompt"]) for r in rows]


@pytest.mark.parametrize(
    ("name", "other"), [("dates-en", "dates-de"), ("numbers-en", "numbers-fr")]
)
def test_splits_never_overlap(name: str, other: str) -> None:
    """For any seed and size, and not even across locales or languages."""
    sizes = {"train": 3000, "validation": 700, "test": 700}
    seen = {
        split: set(_values(name, split, sizes[split], 0)) | set(_values(other, split, 300, 5))
        for split in SPLITS
    }
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not seen[a] & seen[b]


def test_no_value_occurs_twice_and_draws_repeat() -> None:
    for name in ("dates-en", "numbers-en"):
        values = _values(name, "train", 2500, 3)
        assert len(set(values)) == 2500
        assert _values(name, "train", 100, 3) == values[:100]
        assert _values(name, "train", 100, 4) != values[:100]


def test_draws_do_not_depend_on_the_process() -> None:
    code = (
        "from lorasmith.training.builtin import load_builtin;"
        "print(load_builtin('dates-en', 'test', 3, 7)[:])"
    )
    import os

    env = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert out.stdout.strip() == str(load_builtin("dates-en", "test", 3, 7)[:])


def test_the_whole_split_can_be_drawn_and_no_more() -> None:
    total = sum(len(_values("dates-en", split, n, 0)) for split, n in builtin.DEFAULT_ROWS.items())
    assert total == 2400
    with pytest.raises(DataError, match="not that many rows") as caught:
        load_builtin("dates-en", "test", 100_000)
    most = int(str(caught.value.expected).split()[-1])
    days = (dt.date(2100, 1, 1) - dt.date(1900, 1, 1)).days
    assert abs(most / days - 0.1) < 0.01
    assert len(set(_values("dates-en", "test", most, 0))) == most


def test_names() -> None:
    names = builtin_names()
    assert list(names) == sorted(set(names))
    assert {"dates-en", "dates-de", "dates-pt-BR", "numbers-en", "numbers-fr-CH"} <= set(names)
    same = [load_builtin(n, "test", 5)[:] for n in ("dates-pt-BR", "dates-pt_BR", "Dates-pt-br")]
    assert same[0] == same[1] == same[2]


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="dates-en") as caught:
        load_builtin("date-en")
    assert "numbers" not in str(caught.value.expected)
    with pytest.raises(UnknownNameError):
        load_builtin("numbers-am")  # incomplete in num2words
    with pytest.raises(DataError, match="no split 'dev'"):
        load_builtin("dates-en", "dev")
    with pytest.raises(ConfigError):
        load_builtin("dates-en", "train", 0)


@pytest.mark.parametrize(
    ("package", "name"), [("babel", "dates-en"), ("num2words", "numbers-en"), ("datasets", "x")]
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=package) as caught:
        load_builtin(name)
    assert "lorasmith[train]" in str(caught.value)


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorasmith.training.builtin, lorasmith.training.data;"
        "print([m for m in ('torch', 'datasets', 'babel', 'num2words', 'transformers')"
        " if m in sys.modules])"
    )
    import os

    env: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert out.stdout.strip() == "[]"
