import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milora_vl.eval.prefix_tree import build_tree, count_common, plan_trees

many_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


def spelled(tree, leaf):
    """What a leaf sees, in order of position."""
    nodes = np.flatnonzero(tree.attends[leaf])
    nodes = nodes[np.argsort(tree.positions[nodes])]
    assert list(tree.positions[nodes]) == list(range(len(nodes)))
    return list(tree.input_ids[nodes])


@given(many_ids, st.booleans())
def test_each_leaf_sees_exactly_its_row(ids, share):
    rows = sorted(range(len(ids)), key=ids.__getitem__)
    tree = build_tree(ids, rows, share=share)
    assert list(tree.rows) == rows
    for row, leaf in zip(tree.rows, tree.leaves, strict=True):
        assert spelled(tree, leaf) == ids[row]


@given(many_ids)
def test_each_distinct_prefix_is_computed_once(ids):
    rows = sorted(range(len(ids)), key=ids.__getitem__)
    prefixes = {tuple(one[:end]) for one in ids for end in range(1, len(one) + 1)}
    assert len(build_tree(ids, rows).input_ids) == len(prefixes)


@given(many_ids, st.data())
def test_a_plan_holds_every_row_once_and_never_mixes_groups(ids, data):
    groups = data.draw(
        st.lists(st.sampled_from([None, "x", "y"]), min_size=len(ids), max_size=len(ids))
    )
    trees = plan_trees(ids, groups, max_rows=3, max_nodes=9)
    assert sorted(row for tree in trees for row in tree) == list(range(len(ids)))
    for tree in trees:
        assert len({groups[row] for row in tree}) == 1
        assert len(tree) <= 3
        assert len(build_tree(ids, tree).input_ids) - len(ids[tree[0]]) <= 9


def test_a_long_common_beginning_is_shared_whatever_the_limit():
    picture = [7] * 576  # LLaVA-1.5's image tokens, more than the limit by themselves
    ids = [[*picture, 1, row] for row in range(18)]
    assert plan_trees(ids, ["x"] * 18, max_rows=32, max_nodes=512) == [list(range(18))]


def test_without_sharing_every_row_is_alone():
    assert plan_trees([[1, 2], [1, 3]], ["x", "x"], max_rows=9, max_nodes=9, share=False) == [
        [0],
        [1],
    ]


def test_common_beginning():
    assert count_common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert count_common([1], [1, 2]) == 1


def test_an_empty_row_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        build_tree([[]], [0])
