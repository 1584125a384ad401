"""Data sets that are made on the fly, offline, from packages with real linguistic data.

``dates-LOCALE``
    A date written out in one of the locale's own formats (Babel, i.e. Unicode CLDR) → the
    same date in ISO 8601. Years 1900 to 2099. Any locale that Babel knows: ``dates-en``,
    ``dates-de``, ``dates-ja``, ``dates-pt-BR``, …
``numbers-LANGUAGE``
    An integer from 0 to 999,999 → the same integer in words (num2words): ``numbers-en``,
    ``numbers-es``, …

Every underlying value (the day, the integer) belongs to exactly one split, by a hash of the
value alone: 80 % train, 10 % validation, 10 % test. So the splits are disjoint for every seed
and every size, and across locales and languages too: a test date of ``dates-de`` is in no
training set of ``dates-en``.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lorasmith.errors import ConfigError, DataError, MissingDependencyError, UnknownNameError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SPLITS", "builtin_names", "load_builtin"]

SPLITS = ("train", "validation", "test")
"""Splits of every built-in data set."""

DEFAULT_ROWS = {"train": 2000, "validation": 200, "test": 200}
"""Rows made when no number is asked for."""

_FIRST_DAY = dt.date(1900, 1, 1)
_LAST_DAY = dt.date(2099, 12, 31)
_LARGEST_NUMBER_DIGITS = 6

# Only formats that name the month or come from the locale's own medium, long and full formats:
# the purely numeric skeletons (yMd) repeat the medium format of most locales.
_STANDARD_FORMATS = ("full", "long", "medium")
_SKELETONS = ("yMMMd", "yMMMEd", "yMMMMd", "yMMMMEEEEd")

# num2words 0.5.14 raises TypeError on most Amharic numbers above 1,000.
_INCOMPLETE_LANGUAGES = frozenset({"am"})

# num2words uses two codes that CLDR does not have.
_LANGUAGE_NAMES = {"kz": "Kazakh", "tet": "Tetum"}


def _extra(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"The built-in data sets need the package {package}.",
        got="it is not installed",
        fix="pip install 'lorasmith[train]'",
    )


def _babel() -> Any:
    try:
        import babel
        import babel.dates
        import babel.localedata
    except ImportError as error:
        raise _extra("babel") from error
    return babel


def _num2words() -> Any:
    try:
        import num2words
    except ImportError as error:
        raise _extra("num2words") from error
    return num2words


def _locales() -> dict[str, str]:
    """Public name → Babel identifier."""
    identifiers: list[str] = _babel().localedata.locale_identifiers()
    return {name.replace("_", "-"): name for name in sorted(identifiers) if name != "root"}


def _languages() -> dict[str, str]:
    """Public name → num2words code."""
    codes: dict[str, Any] = _num2words().CONVERTER_CLASSES
    return {c.replace("_", "-"): c for c in sorted(codes) if c not in _INCOMPLETE_LANGUAGES}


def builtin_names() -> tuple[str, ...]:
    """All names that :func:`load_builtin` takes, sorted.

    Raises:
        MissingDependencyError: Babel or num2words is not installed.
    """
    names = [f"dates-{locale}" for locale in _locales()]
    names += [f"numbers-{language}" for language in _languages()]
    return tuple(sorted(names))


def load_builtin(name: str, split: str = "train", n: int | None = None, seed: int = 0) -> Dataset:
    """Make one split of a built-in data set.

    Args:
        name: For example ``"dates-en"``; ``_`` and ``-`` are the same, case is ignored.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        n: Rows. Default: 2,000 for training, 200 for the others.
        seed: Another seed draws other values of the same split. The same seed gives the same
            rows, and the first rows of a longer draw are those of a shorter one.

    Returns:
        A ``datasets.Dataset`` with the string columns ``prompt`` and ``completion``. No value
        occurs twice.

    Raises:
        UnknownNameError: No such data set; near names are given.
        DataError: No such split, or more rows asked for than there are values.
        MissingDependencyError: ``datasets``, Babel or num2words is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise _extra("datasets") from error

    if split not in SPLITS:
        raise DataError(
            f"builtin:{name} has no split {split!r}.", expected=", ".join(SPLITS), got=split
        )
    count = DEFAULT_ROWS[split] if n is None else n
    if count < 1:
        raise ConfigError("Too few rows asked for.", expected="at least 1", got=count)
    write, values, key = _maker(name)
    # Independent of Python's hash randomisation, and not the same draw in every data set.
    generator = random.Random(f"{key}:{split}:{seed}")
    drawn = values(generator, split)
    prompts: list[str] = []
    completions: list[str] = []
    for value in drawn:
        prompt, completion = write(value, generator)
        prompts.append(prompt)
        completions.append(completion)
        if len(prompts) == count:
            break
    if len(prompts) < count:
        raise DataError(
            f"builtin:{name} has not that many rows in its split {split}.",
            expected=f"at most {len(prompts)}",
            got=count,
        )
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


_Write = Callable[[Any, random.Random], "tuple[str, str]"]
_Values = Callable[[random.Random, str], "Iterator[Any]"]


def _maker(name: str) -> tuple[_Write, _Values, str]:
    """How to write a value of this data set, how to draw values, and its canonical name."""
    kind, _, variety = name.replace("_", "-").partition("-")
    kind = kind.lower()
    if kind == "dates":
        identifier = _find(variety, _locales())
        if identifier is not None:
            return _date_writer(identifier), _draw_days, f"dates-{identifier}"
    elif kind == "numbers":
        code = _find(variety, _languages())
        if code is not None:
            return _number_writer(code), _draw_integers, f"numbers-{code}"
    names = builtin_names()
    meant = [f"{k}-{variety}" for k in difflib.get_close_matches(kind, ("dates", "numbers"), n=1)]
    near = [one for one in meant if one in names] or difflib.get_close_matches(
        name.replace("_", "-"), names, n=5, cutoff=0.6
    )
    raise UnknownNameError(
        f"There is no built-in data set {name!r}.",
        expected="one of " + ", ".join(near or ("dates-en", "dates-de", "numbers-en", "…")),
        got=name,
        fix="dates-LOCALE takes any locale of Babel (en, de, pt_BR as pt-br, …), "
        "numbers-LANGUAGE any language of num2words",
    )


def _find(variety: str, known: dict[str, str]) -> str | None:
    if variety in known:
        return known[variety]
    return {public.lower(): own for public, own in known.items()}.get(variety.lower())


def _split_of(value: int) -> str:
    """The split of a value: by its hash alone, whatever the seed, size, locale or language."""
    bucket = hashlib.blake2b(str(value).encode(), digest_size=4).digest()
    share = int.from_bytes(bucket, "big") / 2**32
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _draw_days(generator: random.Random, split: str) -> Iterator[dt.date]:
    first, last = _FIRST_DAY.toordinal(), _LAST_DAY.toordinal()
    for ordinal in generator.sample(range(first, last + 1), last - first + 1):
        if _split_of(ordinal) == split:
            yield dt.date.fromordinal(ordinal)


def _draw_integers(generator: random.Random, split: str) -> Iterator[int]:
    """Distinct integers; every number of digits is equally likely while any are left."""
    digits = list(range(1, _LARGEST_NUMBER_DIGITS + 1))
    seen: set[int] = set()
    left = {k: 10 if k == 1 else 9 * 10 ** (k - 1) for k in digits}
    while digits:
        k = generator.choice(digits)
        value = generator.randrange(0 if k == 1 else 10 ** (k - 1), 10**k)
        if value in seen:
            continue
        seen.add(value)
        left[k] -= 1
        if left[k] == 0:
            digits.remove(k)
        if _split_of(value) == split:
            yield value


def _date_writer(identifier: str) -> _Write:
    babel = _babel()
    locale = babel.Locale.parse(identifier)
    formats = [locale.date_formats[name] for name in _STANDARD_FORMATS]
    formats += [locale.datetime_skeletons[s] for s in _SKELETONS if s in locale.datetime_skeletons]
    # Two digits of a year would leave the century open, so such formats are out.
    patterns = sorted(
        {str(f.pattern) for f in formats if "yy" not in f.pattern.replace("yyyy", "")}
    )

    def write(day: dt.date, generator: random.Random) -> tuple[str, str]:
        pattern = generator.choice(patterns)
        written = babel.dates.format_date(day, pattern, locale=locale)
        return f"Write this date in ISO 8601: {written}", day.isoformat()

    return write


def _number_writer(code: str) -> _Write:
    to_words = _num2words().num2words
    name = _LANGUAGE_NAMES.get(code) or _babel().Locale.parse(code).english_name

    def write(value: int, _: random.Random) -> tuple[str, str]:
        words: str = to_words(value, lang=code)
        # Telugu leaves a space at the end of some numbers.
        return f"Write this number in words, in {name}: {value}", words.strip()

    return write
