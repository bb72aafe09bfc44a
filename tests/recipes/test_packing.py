import itertools

import numpy as np
import pytest
import torch

from litropy.recipes.packing import best_fit, concatenate, gather, one_per_window
from litropy.testing import tiny_causal_lm

SIZES = [5, 1, 12, 3, 8, 0, 7, 25, 2]
OFFSETS = np.cumsum([0, *SIZES])
ORDER = np.random.default_rng(0).permutation(len(SIZES))
TOKENS = np.arange(OFFSETS[-1]).astype(np.uint16) + 1
PAD = 999


def batch_of(windows, targets=None):
    return gather(windows, np.arange(len(windows)), TOKENS, targets, PAD)


def test_concatenated_windows_hold_every_token_once_in_order():
    windows = concatenate(OFFSETS, ORDER, 8)
    batch = batch_of(windows)
    expected = np.concatenate([TOKENS[OFFSETS[i] : OFFSETS[i + 1]] for i in ORDER])
    ids = batch["input_ids"].ravel()
    assert ids[: len(expected)].tolist() == expected.tolist()
    assert (ids[len(expected) :] == PAD).all()
    assert len(windows) == -(-len(expected) // 8)


def test_positions_restart_and_first_tokens_are_no_targets():
    batch = batch_of(concatenate(OFFSETS, ORDER, 8))
    starts = {int(TOKENS[OFFSETS[i]]) for i in range(len(SIZES)) if SIZES[i]}
    for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
        position = 0
        for column, token in enumerate(ids):
            if token == PAD:
                assert labels[column] == -100
                assert positions[column] == column - int((ids != PAD).sum())
                continue
            position = 0 if column == 0 or token in starts else position + 1
            assert positions[column] == position
            assert labels[column] == (token if position else -100)


def test_best_fit_keeps_documents_whole_and_wastes_little():
    windows = best_fit(OFFSETS, ORDER, 12)
    batch = batch_of(windows)
    assert windows.truncated == 1  # the document of 25 tokens
    rows = batch["input_ids"].tolist()
    for index, size in enumerate(SIZES):
        document = TOKENS[OFFSETS[index] : OFFSETS[index] + min(size, 12)].tolist()
        if document:
            (row,) = [row for row in rows if document[0] in row]
            begin = row.index(document[0])
            assert row[begin : begin + len(document)] == document
    assert len(windows) == 5  # 50 tokens that are kept, of 12 each


def test_best_fit_packs_many_examples_tightly():
    sizes = np.random.default_rng(1).integers(1, 200, size=2000)
    windows = best_fit(np.cumsum([0, *sizes]), np.arange(2000), 256)
    used = np.add.reduceat(windows.size, windows.first_span[:-1])
    assert used.max() <= 256
    assert used.sum() == sizes.sum()
    assert used.sum() / (256 * len(windows)) > 0.97
    assert len(np.unique(windows.begin)) == 2000


@pytest.mark.parametrize("cut", [True, False])
def test_one_document_per_window_has_a_mask(cut):
    windows = one_per_window(OFFSETS, ORDER, 12, cut)
    batch = batch_of(windows)
    assert ((batch["input_ids"] != PAD) == (batch["attention_mask"] == 1)).all()
    assert (np.diff(batch["attention_mask"], axis=1) <= 0).all()  # padding on the right
    kept = SIZES if cut else [min(size, 12) for size in SIZES]
    assert batch["attention_mask"].sum() == sum(kept)
    assert windows.truncated == (0 if cut else 1)


def test_targets_select_labels_and_missing_rows_are_padding():
    targets = np.zeros(len(TOKENS), dtype=bool)
    targets[10:20] = True
    windows = concatenate(OFFSETS, np.arange(len(SIZES)), 8)
    labels = batch_of(windows, targets)["labels"]
    first = set((OFFSETS[:-1] + 1).tolist()) | set(range(1, 100, 8))
    assert sorted(labels[labels >= 0].tolist()) == [t for t in range(11, 21) if t not in first]
    empty = gather(windows, np.array([0, -1]), TOKENS, None, PAD)
    assert (empty["input_ids"][1] == PAD).all()
    assert (empty["labels"][1] == -100).all()
    assert empty["input_ids"][0].tolist() == batch_of(windows)["input_ids"][0].tolist()


def test_nothing_packs_to_nothing():
    for layout in (concatenate, best_fit):
        assert len(layout(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), 8)) == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mistral"])
def test_packed_documents_do_not_see_each_other(architecture):
    model = tiny_causal_lm(architecture).eval()
    offsets = np.array([0, 9, 14, 30])
    tokens = np.random.default_rng(0).integers(0, 100, size=30).astype(np.uint16)
    batch = gather(concatenate(offsets, np.arange(3), 32), np.array([0]), tokens, None, 0)
    ids, positions = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["position_ids"])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        leaky = model(input_ids=ids, use_cache=False).logits[0]
        for begin, end in itertools.pairwise(offsets):
            alone = model(input_ids=ids[:, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-4)
            if begin:
                assert (leaky[begin:end] - alone).abs().max() > 1e-3
