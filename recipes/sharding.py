"""FSDP2 for a ``CausalLM``: which modules become units, and how the shards come together again."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from litropy.recipes.causal_lm import CausalLM

__all__ = ["decoder_layers", "full_state_dict", "is_sharded", "shard"]


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a backbone: the list of modules that holds the most parameters.

    Example::

        >>> decoder_layers(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
        [Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True)]
    """
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=()))


def shard(model: CausalLM, mesh: DeviceMesh, precision: str) -> None:
    """Shard a model over the mesh's data-parallel ranks, in place.

    Each decoder layer is a unit; embedding, final norm and head belong to the root unit, which is gathered when
    ``model`` is called and kept until its backward pass is over.

    Args:
        model: on a CPU or the mesh's device, with equal weights on every rank.
        mesh: as ``ModelParallelStrategy`` makes it, with dimensions ``data_parallel`` and ``tensor_parallel``.
        precision: the trainer's precision, such as ``"bf16-mixed"``.

    Raises:
        ValueError: if the mesh asks for tensor parallelism.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"The strategy has tensor_parallel_size={mesh['tensor_parallel'].size()}; this model is sharded over"
            f" data-parallel ranks only."
            " Set data_parallel_size to the number of devices and tensor_parallel_size to 1."
        )
    if "data_parallel" in names:
        mesh = mesh["data_parallel"]
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for layer in decoder_layers(model.backbone):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # the root's floating inputs are counts of tokens, which must stay exact
    root_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=root_policy)
    register_fsdp_forward_method(model, "generate")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather all parameters and buffers on the CPU of rank 0; other ranks of a sharded model get an empty dict.

    Every rank must call this.
    """
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: value for name, value in get_model_state_dict(model, options=options).items() if isinstance(value, Tensor)
    }
