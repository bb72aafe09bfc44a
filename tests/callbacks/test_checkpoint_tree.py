"""State that is no tensor comes back with its exact types, from JSON alone."""

import json
import math
import random
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.data import AttributeDict

from litropy.callbacks.checkpoint_tree import flatten_tree, unflatten_tree


def there_and_back(tree):
    flat, tensors = flatten_tree(tree)
    return unflatten_tree(json.loads(json.dumps(flat)), tensors.__getitem__)


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.sampled_from([Path("a/b"), torch.float8_e5m2, torch.device("cuda:1"), torch.Size([2, 3]), timedelta(3, 2, 1)])
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.tuples(st.integers()), inner)
    ),
    max_leaves=12,
)  # fmt: skip


@given(TREES)
@settings(max_examples=50, deadline=None)
def test_what_is_no_tensor_survives(tree):
    # repr tells types, orders and signs of zero, and takes a NaN for itself
    assert repr(there_and_back(tree)) == repr(tree)


@pytest.mark.parametrize(
    "value",
    [
        {"$": "tensor", "v": "a trap"}, OrderedDict(b=1, a=2), Counter("hello"), deque([1, (2,)]), {(1, "x")},
        frozenset([2]),
        Namespace(a=[1], b=Namespace(c=None)), AttributeDict(a=1), -0.0, math.inf, 2**200, "\ud800", np.float32(1.1),
        np.int64(3), np.bool_(True), random.Random(3).getstate(), [], {}, (), {(1, 2): {None: ()}},
    ],
    ids=repr,
)  # fmt: skip
def test_types_survive(value):
    back = there_and_back({"x": value})["x"]
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)


def test_arrays_and_tensors_survive():
    state = np.random.RandomState(3).get_state()
    parameter = torch.nn.Parameter(torch.ones(2))
    tree = {"numpy": state, "empty": np.zeros((0, 3), ">i2"), "leaf": torch.ones(1, requires_grad=True), "p": parameter}
    back = there_and_back(tree)
    assert back["numpy"][0] == state[0]
    assert np.array_equal(back["numpy"][1], state[1])
    assert back["numpy"][2:] == state[2:]
    assert back["empty"].dtype == np.dtype(">i2")
    assert back["empty"].shape == (0, 3)
    assert back["leaf"].requires_grad
    assert isinstance(back["p"], torch.nn.Parameter)


def test_tensors_are_named_by_their_path_and_never_confused():
    ones = torch.ones(1)
    flat, tensors = flatten_tree({"a": {"b": ones}, "a/b": torch.zeros(1), 0: [ones], "__metadata__": ones})
    assert set(tensors) == {"a/b", "a/b#2", "0/0", "__metadata__#2"}
    back = unflatten_tree(flat, tensors.__getitem__)
    assert torch.equal(back["a"]["b"], torch.ones(1))
    assert torch.equal(back["a/b"], torch.zeros(1))


def test_versions_of_modules_survive():
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    assert there_and_back({"s": state})["s"]._metadata == state._metadata


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, torch.nn.Linear, np.array([object()]), range(3), torch.optim.SGD]
)
def test_what_cannot_be_stored_is_named_by_its_path(value):
    with pytest.raises(ValueError, match=r"checkpoint\['hyper_parameters'\]\['layers'\]\[1\] is a .*without pickle"):
        flatten_tree({"hyper_parameters": {"layers": [0, value]}})


def test_a_tree_that_holds_itself():
    tree: dict = {}
    tree["self"] = tree
    with pytest.raises(ValueError, match="or holds itself"):
        flatten_tree(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "object", "v": 1}, {"$": "tuple"}, {"$": "tuple", "v": 3}, {"$": "float", "v": "00"}, {"$": [], "v": 1},
        {"$": "dict", "v": [1]}, {"$": "array", "v": "a", "dtype": "O", "shape": [1]}, {"$": "bytes", "v": "?"},
        {"$": "array", "v": "a", "dtype": "<f8", "shape": [2**60]}, {"$": "set", "v": [[]]},
        {"$": "dtype", "v": "load"},
        {"$": "device", "v": "moon"}, {"$": "array", "v": "a", "dtype": "no such", "shape": [1]},
        {"$": "timedelta", "v": [10**30]}, {"$": "dtype", "v": "nn.x"},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_trees(tree):
    with pytest.raises(ValueError, match=r"checkpoint\['x'\]"):
        unflatten_tree({"x": tree}, lambda name: torch.zeros(8, dtype=torch.uint8))
