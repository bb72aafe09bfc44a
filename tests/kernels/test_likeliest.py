"""The greatest entries of long rows are those of a sort, wherever they lie."""

import pytest
import torch

from litropy.kernels.likeliest import _by_bisection, first_likeliest, greatest, kth_greatest, likeliest
from litropy.losses import linear_head_stats


def rows(width, seed=0):
    """Flat and sharp rows, one with equal entries, one with few that are finite, one in falling order."""
    z = torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[1] *= 8
    z[2] = z[2].round()
    z[3, width // 3 :] = -torch.inf
    z[4] = 0
    z[5] = z[5].sort(descending=True).values
    z[6] = z[6].sort().values
    return z


@pytest.mark.parametrize("width", [1, 40, 1000, 4096, 5003])
@pytest.mark.parametrize("k", [1, 32, 101])
def test_likeliest_are_those_of_topk(width, k):
    z = rows(width)
    values, places = likeliest(z, k)
    assert torch.equal(values, z.topk(min(k, width), 1).values)
    assert torch.equal(z.gather(1, places), values)
    assert all(len(set(row)) == len(row) for row in places.tolist())
    assert torch.equal(greatest(z, k), values)
    half = z.bfloat16()  # NumPy does not know it
    assert torch.equal(likeliest(half, k)[0], half.topk(min(k, width), 1).values)
    assert torch.equal(greatest(half, k), half.topk(min(k, width), 1).values)


def test_greatest_of_more_than_fits_a_cache():
    z = rows(90001).float()
    assert torch.equal(greatest(z, 101), z.topk(101, 1).values)


@pytest.mark.parametrize("width", [5, 3001])
def test_what_is_behind_is_found_however_long_the_first_part(width):
    logprob = rows(width).log_softmax(-1)
    share = torch.tensor([0.99, 0.5, 0.3, 0.9, 0.7, 1.0, 0.2], dtype=torch.float64)

    def behind(top, place):
        mass = top.exp()
        return mass.cumsum(-1) - mass >= share[place, None]

    values, places = first_likeliest(logprob, behind)
    found = torch.full_like(logprob, -torch.inf).scatter_reduce(1, places, values, "amax")
    assert torch.equal(values, values.sort(1, descending=True).values)
    for row, kept in enumerate(found > -torch.inf):
        ordered = logprob[row].exp().sort(descending=True).values
        count = int(((ordered.cumsum(0) - ordered < share[row]) & (ordered > 0)).sum())
        assert int(kept.sum()) == pytest.approx(
            count, abs=1 if row == 5 else 0
        )  # a share of 1 ends where rounding says
        assert torch.equal(found[row][kept], logprob[row][kept])
        assert torch.equal(logprob[row][kept].exp().sort(descending=True).values, ordered[: int(kept.sum())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 1000])
def test_kth_greatest_is_that_of_a_sort(width, dtype):
    z = rows(width).to(dtype)
    ordered = z.sort(descending=True).values
    for k in {1, 2, 37, width // 2, width} - {0}:
        place = torch.tensor([min(k + row % 2, width) for row in range(len(z))])
        expected = ordered.gather(1, place[:, None] - 1)[:, 0]
        for known in {1, min(40, width), width}:
            assert torch.equal(kth_greatest(z, place, ordered[:, :known]), expected)
        assert torch.equal(_by_bisection(z, place), expected)


@pytest.mark.parametrize("nucleus", ["closed", "open"])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_nuclei_within_and_beyond_the_first_entries(nucleus, top_p):
    """With an identity for the head the hidden states are the logits."""
    z = rows(900)[[0, 1, 2, 5, 6]].requires_grad_()
    found = linear_head_stats(
        z, torch.eye(900, dtype=torch.float64), stats=("nucleus_entropy",), top_p=top_p, nucleus=nucleus
    ).nucleus_entropy
    (slope,) = torch.autograd.grad(found.sum(), z)
    ordered = z.detach().sort(descending=True).values
    place = (ordered.softmax(-1).cumsum(-1) < top_p).sum(-1, keepdim=True)
    threshold = ordered.gather(1, place)
    inside = z > threshold if nucleus == "open" else z >= threshold
    p = torch.where(inside, z, -torch.inf).softmax(-1)
    expected = -torch.where(inside, p * p.clamp(min=1e-300).log(), 0).sum(-1)
    (truth,) = torch.autograd.grad(torch.where(inside.any(-1), expected, 0).sum(), z)
    torch.testing.assert_close(found, expected.detach().to(found.dtype), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope, truth.nan_to_num(0), rtol=1e-8, atol=1e-10)
    sizes = inside.sum(-1)
    assert sizes.min() < 16 < sizes.max(), "both ways have to be taken"
