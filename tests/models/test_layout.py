"""The sharing layout: its forms, its string, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcore.models import Layout


@st.composite
def layouts(draw):
    owners = []
    for i in range(draw(st.integers(1, 12))):
        owners.append(draw(st.sampled_from([i, *set(owners)])))
    return Layout(tuple(owners))


@given(layouts())
def test_string_round_trip(layout):
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(str(layout), layout.num_layers) == layout
    assert Layout.coerce(str(layout), len(layout)) == Layout.coerce(layout.owners, len(layout)) == layout


@given(layouts())
def test_groups_partition_the_consumers(layout):
    assert sorted(c for consumers in layout.groups.values() for c in consumers) == list(layout.consumers)
    for owner, consumers in layout.groups.items():
        assert consumers == layout.consumers_of(owner)
        assert not layout.is_consumer(owner)
        assert all(layout.owner_of(c) == owner and layout.is_consumer(c) and c > owner for c in consumers)
    assert layout.shared == len(layout.consumers) == sum(layout.is_consumer(i) for i in range(len(layout)))
    assert layout.is_full == (layout.shared == 0)


def test_forms():
    assert str(Layout.parse("0_1_2_2_2_2")) == "0_1_2_2_2_2"
    assert Layout.from_start(6, 3) == Layout.from_shared(6, 3) == Layout.parse("0_1_2_2_2_2")
    assert Layout.from_start(6, 6) == Layout.from_shared(6, 0) == Layout.full(6)
    assert Layout.from_start(6, 1) == Layout((0,) * 6)
    assert Layout.blockwise(6, 2) == Layout.parse("0_0_2_2_4_4")
    assert Layout.blockwise(7, 3, start=1) == Layout.parse("0_1_1_1_4_4_4")
    assert Layout.blockwise(4, 1) == Layout.full(4)
    assert Layout.coerce(3, 6) == Layout.from_start(6, 3)


def test_questions():
    top = Layout.parse("0_1_2_2_2_2")
    assert (top.start, top.shared, top.top_owner, top.groups) == (3, 3, 2, {2: (3, 4, 5)})
    assert Layout.full(4).start == 4 and Layout.full(4).top_owner is None
    assert Layout.parse("0_0_2_2").top_owner is None
    assert Layout.parse("0_0_2").top_owner is None
    assert hash(top) == hash(Layout.from_start(6, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(()), "at least one layer"),
        (lambda: Layout.parse(""), "one owner index per layer"),
        (lambda: Layout.parse("0_x_1"), "'0_x_1'"),
        (lambda: Layout.parse("0,1,1"), "joined by '_'"),
        (lambda: Layout.parse("0_2_2"), "layer 1 points forward to layer 2"),
        (lambda: Layout.parse("0_0_1"), "layer 2 names layer 1 as its owner, but that one uses layer 0's"),
        (lambda: Layout((0, -1)), "must not be negative"),
        (lambda: Layout((0, 1.0)), "layer index"),
        (lambda: Layout((0, True)), "layer index"),
        (lambda: Layout.parse("0_1_1", 4), "3 layers but the model has 4"),
        (lambda: Layout.coerce("0_1_1", 4), "3 layers but the model has 4"),
        (lambda: Layout.from_start(6, 0), "from 1 to 6, got 0 .*no layer before it"),
        (lambda: Layout.from_start(6, 7), "from 1 to 6, got 7"),
        (lambda: Layout.from_shared(6, 6), "from 0 to 5, got 6"),
        (lambda: Layout.from_shared(6, -1), "from 0 to 5"),
        (lambda: Layout.blockwise(6, 0), "every must be at least 1"),
        (lambda: Layout.blockwise(6, 2, start=7), "from 0 to 6"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
