from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import AdapterFileError
from lorasmith.io.strict import parse_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES))
def test_valid_objects_are_read(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode(), "f") == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"r": 8, "r": 9}', "given twice"),
        (b'{"a": {"r": 8, "r": 8}}', "given twice"),
        (b"[1]", "does not hold a JSON object"),
        (b'"x"', "does not hold a JSON object"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": -Infinity}', "not finite"),
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (16 * 2**20 + 1), "too large"),
    ],
)
def test_everything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message) as caught:
        parse_object(data, "some/file.json")
    assert caught.value.file == "some/file.json"
