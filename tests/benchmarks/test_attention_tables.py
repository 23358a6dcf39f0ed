"""The tables on attention in the docs are those of the kept results."""

import re

from benchmarks.ops import attention_tables
from benchmarks.tables import put


def test_the_pages_show_the_kept_results():
    seen = set()
    for page in attention_tables.PAGES:
        text = (attention_tables.ROOT / "docs" / page).read_text()
        assert attention_tables.fill(text) == text
        emptied = text
        for name in attention_tables.TABLES:
            emptied = put(emptied, name, "")
            seen |= {name} if re.search(f"<!-- {name} -->\n\n<!-- /{name} -->", emptied) else set()
        assert attention_tables.fill(emptied) == text
    assert seen == set(attention_tables.TABLES)
