"""Hostlist expressions against a slow twin, and what is refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.discover.hostlist import MAX_NAMES, expand_hostlist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("login-1.x,b_2", ["login-1.x", "b_2"]),
        ("node[001-003,7]", ["node001", "node002", "node003", "node7"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[08-10]x", ["n08x", "n09x", "n10x"]),
        ("r[1-2]n[0,5]", ["r1n0", "r1n5", "r2n0", "r2n5"]),
        ("b[2],a[1]", ["b2", "a1"]),
    ],
)
def test_expansion(text, names):
    assert list(expand_hostlist(text)) == names


RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9)), min_size=1, max_size=4)
ITEMS = st.tuples(st.sampled_from(["n", "rack-", "a.b_"]), st.integers(1, 4), RANGES, st.sampled_from(["", "x", "-ib"]))


@given(st.lists(ITEMS, min_size=1, max_size=3))
def test_expansion_is_what_each_range_counts(items):
    text = ",".join(f"{head}[{','.join(f'{a:0{w}}-{a + d:0{w}}' for a, d in ranges)}]{tail}" for head, w, ranges, tail in items)
    expected = [f"{head}{n:0{w}}{tail}" for head, w, ranges, tail in items for a, d in ranges for n in range(a, a + d + 1)]
    # A range without zeros in front grows by itself, as 99-101 does.
    assert list(expand_hostlist(text)) == expected


@pytest.mark.parametrize(
    "text", ["", ",", "a,", ",a", "a,,b", "n[", "n[]", "n[1-]", "n[2-1]", "n[1", "n]1[", "n[a]", "a b", "n[1]]", "n[[1]]", "n[-1]", "é"]
)
def test_what_is_no_hostlist_is_refused(text):
    with pytest.raises(ScaleMoEError, match="expected"):
        expand_hostlist(text)


@pytest.mark.parametrize("text", ["n[0-99999999]", "n[1-300]r[1-300]", "n[0-65536]", ",".join(["n[1-9999]"] * 7)])
def test_too_many_names_are_refused_before_they_are_made(text):
    with pytest.raises(ScaleMoEError, match="more than 65536 names"):
        expand_hostlist(text)


def test_the_largest_hostlist_is_accepted():
    names = expand_hostlist("n[0-255]x[0-255]")
    assert len(names) == MAX_NAMES
    assert names[-1] == "n255x255"
    assert len(set(itertools.islice(names, 1000))) == 1000
