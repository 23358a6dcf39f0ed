"""The tables of docs/ops.md on attention are those of the kept results."""

import re

from benchmarks.ops import attention_tables
from benchmarks.tables import put


def test_the_page_shows_the_kept_results():
    text = (attention_tables.ROOT / "docs" / "ops.md").read_text()
    assert attention_tables.fill(text) == text
    emptied = text
    for name in attention_tables.TABLES:
        emptied = put(emptied, name, "")
        assert re.search(f"<!-- {name} -->\n\n<!-- /{name} -->", emptied)
    assert attention_tables.fill(emptied) == text
