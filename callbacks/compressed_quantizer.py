"""Lets Hugging Face's ``from_pretrained`` read compressed folders: a quantizer whose weights decode bit for bit."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from litropy.callbacks.checkpoint_record import decode_record
from litropy.callbacks.compressed_folder import METHOD

__all__ = ["CompressedConfig", "CompressedQuantizer"]

_NO_PLANS = (
    "compressed weights are not loaded under a tensor-parallel plan. Leave `tp_plan` and `tp_size` out, or"
    " `litropy decompress` the folder first."
)


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a compressed folder.

    Args:
        version: of the format.

    Raises:
        ValueError: for a version that this litropy does not read.
    """

    def __init__(self, version: int = 1, **kwargs: Any) -> None:
        if version != 1:
            raise ValueError(f"The folder has format version {version}; this litropy reads 1: update litropy.")
        self.quant_method = METHOD
        self.version = version
        # Hugging Face then takes this config off the model: it is an ordinary one once it is loaded
        self.dequantize = True


@register_quantizer(METHOD)
class CompressedQuantizer(HfQuantizer):
    """Decodes every tensor of the file, before whatever else the architecture does with it."""

    _leaves: tuple[str, ...] = ()
    _dtype_plan: Mapping[str, torch.dtype] = MappingProxyType({})

    def update_attn_implementation(self, config: Any) -> Any:
        """See the config before the weights' file is looked for.

        Raises:
            ValueError: if tensor parallelism is asked for.
        """
        plan = getattr(config, "distributed_config", None)
        plan = plan if isinstance(plan, dict) else vars(plan or object)
        if (plan.get("tp_size") or 1) > 1:
            raise ValueError(f"`tp_size` is {plan['tp_size']}: {_NO_PLANS}")
        # with this key, Hugging Face alone refuses to load the folder
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    # older versions have this hook in its place
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._leaves = tuple(sorted({name.rpartition(".")[2] for name in model.state_dict()}))
        self._model_type = model.config.model_type
        # what is read is cast to what the model's plan says by pattern: to nothing, until it is decoded
        nothing = dict.fromkeys(self._leaves)
        if hasattr(model, "dtype_plan"):  # transformers 5.0
            self._dtype_plan, model.dtype_plan = model.dtype_plan, nothing
        else:
            self._dtype_plan, model._get_dtype_plan = model._get_dtype_plan(model.dtype), lambda dtype: nothing
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if hasattr(model, "dtype_plan"):
            model.dtype_plan = self._dtype_plan
        else:
            del model._get_dtype_plan
        # what is saved from here on is plain: only the architecture's own conversions are to be undone
        kept = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [op for op in conversion.operations if not isinstance(op, Decode)]
                if not conversion.operations:
                    continue
            kept.append(conversion)
        model._weight_conversions = kept
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Converters of tensors that the architecture takes as they are: one for each last part of a name."""
        leaves = [
            WeightConverter(source_patterns=[leaf], target_patterns=[leaf], operations=[Decode(self)])
            for leaf in self._leaves
        ]
        if hasattr(HfQuantizer, "update_weight_conversions"):
            return leaves
        # older versions only append: of two converters of one pattern the last is taken
        own = [
            one for one in get_checkpoint_conversion_mapping(self._model_type) or [] if isinstance(one, WeightConverter)
        ]
        for converter in own:
            converter.operations = [Decode(self), *converter.operations]
        return [*own, *leaves]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Decode first where the architecture has converters of its own, such as those that merge experts."""
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter):
                converter.operations = [Decode(self), *converter.operations]
        return [*weight_conversions, *self.get_weight_conversions()]

    def dtype_of(self, name: str, parameter: Tensor) -> torch.dtype:
        """What a decoded tensor is cast to: some architectures keep some parameters in float32 in any case."""
        planned = (dtype for pattern, dtype in self._dtype_plan.items() if re.search(pattern.replace("*", ".*"), name))
        return next(planned, parameter.dtype)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are ordinary parameters once they are loaded."""
        return True


class Decode(ConversionOps):
    """Payloads of the file become tensors, on the device where they are.

    Args:
        quantizer: says to Hugging Face that payloads are not to be cast.
    """

    def __init__(self, quantizer: CompressedQuantizer) -> None:
        self.hf_quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Decode what was collected for one parameter.

        Raises:
            ValueError: if a payload is damaged, or the parameter is sharded.
        """
        target = model.get_parameter_or_buffer(full_layer_name) if model is not None else None
        if isinstance(target, DTensor):
            raise ValueError(f"{full_layer_name} is sharded: {_NO_PLANS}")
        dtype = None if target is None else self.hf_quantizer.dtype_of(full_layer_name, target)
        return {
            pattern: [
                _decode(value, dtype, full_layer_name) for value in (values if isinstance(values, list) else [values])
            ]
            for pattern, values in input_dict.items()
        }


def _decode(payload: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    try:
        tensor = decode_record(payload)
    except ValueError as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    cast = dtype is not None and tensor.is_floating_point() and dtype != tensor.dtype
    return tensor.to(dtype) if cast else tensor
