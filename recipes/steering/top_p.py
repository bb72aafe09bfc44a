"""Nucleus sampling."""

from torch import Tensor

from litropy.kernels.likeliest import first_likeliest
from litropy.recipes.steering.sampler import TruncatingSampler

__all__ = ["TopP"]


class TopP(TruncatingSampler):
    """Draws from the nucleus: the smallest set of likeliest tokens whose mass reaches ``top_p``.

    Args:
        top_p: the mass, in (0, 1].
        temperature: of the softmax, taken before.

    Raises:
        ValueError: if an option is out of its range.

    Reference: "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1.
    """

    def __init__(self, top_p: float = 0.95, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` is {top_p}; it must be in (0, 1].")
        self.top_p = top_p

    def chances(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Drop what comes after the token at which the mass reaches ``top_p``."""
        kept, tokens = first_likeliest(policy, self._behind)
        return kept.softmax(-1), tokens

    def _behind(self, top: Tensor, rows: Tensor) -> Tensor:
        mass = top.exp()
        return mass.cumsum(-1) - mass >= self.top_p
