"""What validation and test report."""

from torch import Tensor, nn

from litropy.recipes.causal_lm import CausalLMOutput
from litropy.recipes.token_mean import TokenMean

__all__ = ["Evaluation"]


class Evaluation(nn.Module):
    """Means over all targets of a data set, across batches and ranks.

    Args:
        with_stats: whether entropy and token accuracy are taken as well.
    """

    def __init__(self, with_stats: bool) -> None:
        super().__init__()
        names = ("loss", "entropy", "token_accuracy") if with_stats else ("loss",)
        self.means = nn.ModuleDict({name: TokenMean() for name in names})

    def update(self, output: CausalLMOutput) -> None:
        """Add a batch whose loss is the mean over its targets."""
        sums = output.sums() | {"loss": output.loss * output.num_targets}
        for name, mean in self.means.items():
            assert isinstance(mean, TokenMean)
            mean.update(sums[name], output.num_targets)

    def pop(self) -> dict[str, Tensor]:
        """Return loss and entropy [nats], perplexity and accuracy so far, the same on every rank, and start again."""
        values = {}
        for name, mean in self.means.items():
            assert isinstance(mean, TokenMean)
            values[name] = mean.compute()
            mean.reset()
        return values | {"perplexity": values["loss"].exp()}
