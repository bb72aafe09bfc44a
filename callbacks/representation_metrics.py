r"""How many directions a layer's outputs use, from running sums that never hold more than their second moments.

The outputs of N tokens, each scaled to length 1, are the rows of Z. Everything follows from three sums over rows, which
add up over batches and ranks: N, :math:`\sum z` and :math:`\sum z z^\top`. With the eigenvalues of
:math:`Z^\top Z / N`, which are at least 0 and sum to 1, written as :math:`\lambda`:

============================  =========================================  ==================  ===========================
metric                        formula                                    range               one direction / isotropic
============================  =========================================  ==================  ===========================
effective rank                exp(-sum p ln p), p = sqrt(lambda) / sum   [1, min(N, D)]      1 / D
participation ratio           1 / sum lambda^2                           [1, min(N, D)]      1 / D
matrix entropy                -sum lambda ln lambda / ln min(N, D)       [0, 1]              0 / 1
mean cosine                   (\|sum z\|^2 - N) / (N (N - 1))            [-1 / (N - 1), 1]   1 / 0
============================  =========================================  ==================  ===========================

Nothing is centred: rows that all share one large component count as one direction, which is what rank collapse looks
like. All four are blind to the rows' lengths (an exploding residual stream looks healthy), to whether the directions
mean anything (noise has full rank), and to what happens within a direction; ranks also grow with N, so compare values
of equal N only. The participation ratio is ruled by the largest eigenvalues, the effective rank also counts weak
directions, and the mean cosine cannot see a collapse onto a line in both directions (its mean is then 0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RowSums",
    "effective_rank",
    "matrix_entropy",
    "mean_cosine",
    "participation_ratio",
    "projection",
    "row_sums",
]


@dataclass(frozen=True)
class RowSums:
    """Sums over rows of length 1; those of several batches or ranks are added.

    Attributes:
        count: N, [...].
        total: sum of the rows, [..., D].
        moment: sum of the rows' outer products, [..., K, K]; K is D, or the width that rows were projected to.
    """

    count: Tensor
    total: Tensor
    moment: Tensor

    def __add__(self, other: "RowSums") -> "RowSums":
        return RowSums(self.count + other.count, self.total + other.total, self.moment + other.moment)

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues of the second moment over its trace, ascending, [..., K]; on a GPU this waits for the device."""
        finite = self.moment.isfinite().all(-1).all(-1)
        # eigvalsh refuses what is not finite; what has no trace or was not finite is NaN below
        values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], self.moment, 0.0)).clamp(min=0)
        return values / torch.where(finite, values.sum(-1), torch.nan)[..., None]


def projection(width: int, to: int, device: torch.device | None = None) -> Tensor:
    """Return orthonormal directions [width, to] onto which rows are projected; always the same for the same sizes.

    Args:
        width: D.
        to: number of directions, at most D.
        device: where to put them.

    Example::

        >>> p = projection(8, 2)
        >>> torch.allclose(p.T @ p, torch.eye(2), atol=1e-6)
        True
    """
    noise = torch.randn(width, to, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(noise).Q.float().to(device)


def row_sums(rows: Tensor, weight: Tensor | None = None, directions: Tensor | None = None) -> RowSums:
    """Sum up rows, each scaled to length 1; rows of zeros have no direction and do not count.

    Args:
        rows: [N, D], any floating dtype.
        weight: [N], 1 for a row that counts and 0 for one that does not; None counts all.
        directions: ``projection(D, K)``, for a second moment of K x K in place of D x D; None keeps all directions.

    Returns:
        Their sums, in float64: squared singular values in float32 would drown a collapsed layer's small ones in noise.
    """
    # Apple's GPUs have no float64
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    # by the largest entry first: squares of large entries overflow
    rows = rows / torch.where(largest > 0, largest, 1.0)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1.0)
    counts = largest.squeeze(-1) != 0
    if weight is not None:
        counts = counts & (weight > 0)
    rows = torch.where(counts[:, None], rows, 0.0)
    projected = (rows if directions is None else rows @ directions).to(exact)
    return RowSums(counts.sum().to(exact), rows.to(exact).sum(0), projected.mT @ projected)


def effective_rank(spectrum: Tensor) -> Tensor:
    r"""Exponential of the entropy of the singular values.

    .. math:: \exp\Bigl(-\sum_k p_k \ln p_k\Bigr), \qquad p_k = \sqrt{\lambda_k} / \sum_j \sqrt{\lambda_j}

    Args:
        spectrum: eigenvalues of the second moment, at least 0, [..., K].

    Returns:
        [...], from 1 to K.

    Example::

        >>> effective_rank(torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
        tensor([1., 3.])

    Reference: Roy and Vetterli, The effective rank, EUSIPCO 2007; Garrido et al., RankMe, arXiv 2210.02885.
    """
    singular = spectrum.sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def participation_ratio(spectrum: Tensor) -> Tensor:
    r"""Number of directions that share the variance, :math:`(\sum \lambda)^2 / \sum \lambda^2`.

    Args:
        spectrum: eigenvalues of the second moment, at least 0, [..., K].

    Returns:
        [...], from 1 to K.

    Example::

        >>> participation_ratio(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    return spectrum.sum(-1).square() / spectrum.square().sum(-1)


def matrix_entropy(spectrum: Tensor, most: Tensor) -> Tensor:
    r"""Von Neumann entropy of the second moment over the largest possible.

    .. math:: -\sum_k \lambda_k \ln \lambda_k \,/\, \ln \min(N, D)

    Args:
        spectrum: eigenvalues of the second moment, summing to 1, [..., K].
        most: how many of them can differ from 0, min(N, D), [...].

    Returns:
        [...], from 0 to 1; NaN where only one can.

    Example::

        >>> matrix_entropy(torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.tensor(4))
        tensor(0.5000)

    Reference: Wei et al., arXiv 2401.17139, who centre the rows first.
    """
    return torch.special.entr(spectrum).sum(-1) / torch.where(most > 1, most, torch.nan).log()


def mean_cosine(sums: RowSums) -> Tensor:
    r"""Mean cosine between two different rows, from the sum of the rows alone.

    .. math:: \frac{\|\sum_i z_i\|^2 - N}{N (N - 1)}

    Returns:
        [...], at most 1; NaN for fewer than two rows.

    Example::

        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        >>> mean_cosine(row_sums(rows))
        tensor(0.3333, dtype=torch.float64)
    """
    pairs = sums.count * (sums.count - 1)
    return torch.where(pairs > 0, (sums.total.square().sum(-1) - sums.count) / pairs, torch.nan)
