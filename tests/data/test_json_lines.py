import pytest

from effcore.data.json_lines import json_lines
from effcore.errors import InputError


def test_objects_with_the_numbers_of_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "é"}', encoding="utf-8")
    assert list(json_lines(path)) == [(1, {"a": 1}), (4, {"b": "é"})]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1}\n{oops\n', r"a.jsonl, line 2: not valid JSON \(.* at column 2\)"),
        (b"[1]\n", "line 1: expected an object, got list"),
        (b'{"a": "\xff"}\n', r"a.jsonl: not UTF-8 text \(byte 0xff\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(json_lines(path))
