"""What a Hugging Face config's numbers may do to the output of a model's head."""

from typing import Any

__all__ = ["logit_transforms"]


def logit_transforms(config: Any, width: int) -> list[tuple[float | None, float]]:
    """Pairs (softcap, scale), for ``softcap tanh(z / softcap) * scale``, that a config allows; the plain head first.

    The same name means a factor in one model and a divisor in another, so which pair it is only the model's own logits
    tell.

    Args:
        config: of the model's text part.
        width: of its hidden states.

    Example::

        >>> from types import SimpleNamespace
        >>> logit_transforms(SimpleNamespace(logit_scale=0.25), 64)
        [(None, 1.0), (None, 0.25), (None, 4.0)]
    """

    def positive(*names: str) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value > 0]

    caps = positive("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    factors = positive("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")
    base_widths = positive("dim_model_base")
    scales = [1.0, *factors, *(1 / factor for factor in factors), *(base / width for base in base_widths)]
    return [(cap, scale) for cap in (None, *caps) for scale in dict.fromkeys(scales)]
