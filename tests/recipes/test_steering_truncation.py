"""Which tokens samplers leave out, in rows of any length, and drawing among the others."""

import numpy as np
import pytest
import torch

from litropy.recipes import steering as s
from litropy.recipes.rlvr_sampling import draw
from litropy.recipes.steering.mirostat import zipf_cutoff


def logits(rows=5, vocabulary=40, scale=2.0):
    generator = torch.Generator().manual_seed(2)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def kept(truncated):
    return [set(np.flatnonzero(row)) for row in np.isfinite(truncated.numpy())]


@pytest.mark.parametrize("width", [5, 40, 3000])
@pytest.mark.parametrize("top_p", [0.0507, 0.6003, 0.9501, 1.0])
def test_top_p(width, top_p):
    rows = logits(6, width, scale=1.0) * torch.tensor([0.0, 0.1, 1, 2, 4, 30])[:, None]
    rows[2, width // 2 :] = -torch.inf
    for row, ours in zip(rows.softmax(-1).tolist(), kept(s.TopP(top_p).truncate(rows)), strict=True):
        ordered, before, count = sorted(row, reverse=True), 0.0, 0
        while count < width and ordered[count] and before < top_p - 1e-12:
            before, count = before + ordered[count], count + 1
        # all of the mass may be reached a rounding error early
        assert len(ours) == count or (top_p == 1 and sum(row[v] for v in ours) > 1 - 1e-9)
        assert sorted((row[v] for v in ours), reverse=True) == ordered[: len(ours)]  # of equals, any


@pytest.mark.parametrize("min_p", [0.05, 1.0])
def test_min_p(min_p):
    rows = logits().round()
    for row, ours in zip(rows.softmax(-1).tolist(), kept(s.MinP(min_p).truncate(rows)), strict=True):
        assert ours == {v for v, p in enumerate(row) if p >= min_p * max(row) * (1 - 1e-9)}


def test_mirostat_keeps_thousands_of_tokens_and_their_equals():
    rows = logits(6, 3000, scale=3.0)
    rows[1] = rows[1].round()
    rows[2] = 0
    rows[3, 5:] = -torch.inf
    method, sizes = s.Mirostat(), set()
    for bound in (0.5, 4.0, 7.0, 9.0, 30.0):
        method._bound = torch.full((6,), bound)
        count = zipf_cutoff(rows.log_softmax(-1), method._bound, 3000).round().clamp(1, 3000).long()
        least = rows.sort(descending=True).values.gather(1, count[:, None] - 1)
        found = method.truncate(rows)
        expected = (rows >= least) & (rows > -torch.inf)
        assert torch.equal(found > -torch.inf, expected)
        sizes |= set(expected.sum(-1).tolist())
    assert {1, 5, 3000} < sizes
    assert any(200 < size < 2900 for size in sizes)


@pytest.mark.parametrize("wide", [7, 1024, 1025, 5000])
def test_what_is_drawn_is_in_proportion_to_the_weights(wide):
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(1, wide, generator=generator) * (torch.rand(1, wide, generator=generator) < 0.5)
    weights[0, wide // 3 : wide // 2] = 0
    weights[0, -1] = 3.0
    columns, share = draw(weights.expand(8000, -1), generator)
    p = (weights.double() / weights.double().sum())[0]
    torch.testing.assert_close(share[:, 0].double(), p[columns[:, 0]], rtol=1e-5, atol=0)
    counts = torch.bincount(columns[:, 0], minlength=wide)
    assert not counts[p == 0].any()
    parts = torch.stack([counts.double() / 8000, p]).split(max(1, wide // 20), 1)
    deviation = max(abs(float(a.sum() - b.sum())) / (float(b.sum()) / 8000) ** 0.5 for a, b in parts if b.sum() > 0)
    assert deviation < 4.5
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            draw(torch.full((2, wide), bad), generator)
