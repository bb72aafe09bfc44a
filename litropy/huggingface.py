"""For Hugging Face models that users drive themselves: the loss without logits, and compressed folders."""

import litropy.callbacks.compressed_quantizer  # noqa: F401 (registers the loader of compressed folders)
from litropy.recipes.patch_causal_lm import patch_causal_lm, unpatch_causal_lm

__all__ = ["patch_causal_lm", "unpatch_causal_lm"]
