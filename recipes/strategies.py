"""Which of Lightning's strategies train a language model right."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from litropy.callbacks.compressed_checkpoint_io import refuse_sharded

__all__ = ["check_strategy"]


def check_strategy(strategy: Strategy, accumulate_grad_batches: int) -> None:
    """Refuse strategies under which the loss, the token mean or compressed checkpoints would be wrong.

    Raises:
        ValueError: naming the strategy and what to use instead.
    """
    refuse_sharded(strategy)
    if isinstance(strategy, FSDPStrategy):
        raise ValueError("FSDPStrategy hides the output head; shard with ModelParallelStrategy (FSDP2) instead.")
    if isinstance(strategy, DeepSpeedStrategy) and accumulate_grad_batches > 1:
        raise ValueError(
            f"accumulate_grad_batches={accumulate_grad_batches} under DeepSpeed would not follow the mean over tokens;"
            " use ModelParallelStrategy or DDP, or accumulate_grad_batches=1 with a larger batch."
        )
