"""Weights divided by their spectral norm: the parametrisation, its power iteration, and the way back."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

__all__ = ["SpectralGain", "fold", "folded_state_dict", "reparametrize", "spectral_gains"]


class SpectralGain(nn.Module):
    r"""Gives a matrix a spectral norm that is a parameter: :math:`\hat W = \frac{\gamma}{\sigma(W)} W`.

    :math:`\sigma(W) = \lVert W u \rVert_2`, where u estimates the first right singular vector. A forward pass only
    reads u; ``advance`` improves it. At first :math:`\gamma = \sigma(W)`, so :math:`\hat W = W`.

    Args:
        weight: the matrix, [out, in].

    Raises:
        ValueError: if all of the matrix is zero, or some of it is not finite.

    Example::

        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> spectral = SpectralGain(weight)
        >>> with torch.no_grad():
        ...     _ = spectral.gain.mul_(2)
        >>> torch.linalg.svdvals(spectral(5 * weight).detach())
        tensor([6.0000, 2.0000])
    """

    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("right", _first_right_singular_vector(wide))
        norm = self.norm(wide)
        if not (torch.isfinite(norm) and norm > 0):
            raise ValueError(f"the spectral norm is {float(norm)}; it must be positive and finite to divide by it")
        # one element and not a scalar, which FSDP2 could not shard
        self.gain = nn.Parameter(norm.reshape(1).to(weight.dtype))

    def norm(self, weight: Tensor) -> Tensor:
        """Estimate the spectral norm; its gradient is exact at the estimate, :math:`v u^T` with v along W u."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.linalg.vector_norm(weight @ self.right)

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with spectral norm ``gain``."""
        wide = weight.to(self.right.dtype)
        return (wide * (self.gain / self.norm(wide))).to(weight.dtype)

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        r"""One step of power iteration, :math:`u \leftarrow W^T W u / \lVert W^T W u \rVert`; W may be sharded."""
        wide, right = weight.to(self.right.dtype), self.right
        if isinstance(wide, DTensor):
            mesh = wide.device_mesh
            right = DTensor.from_local(right, mesh, [Replicate()] * mesh.ndim, run_check=False)
        product = wide.mT @ (wide @ right)
        if isinstance(product, DTensor):
            product = product.full_tensor()
        self.right.copy_(product / torch.linalg.vector_norm(product))

    def _apply(self, fn, recurse: bool = True) -> "SpectralGain":  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Move or cast, but keep at least single precision for the vector."""
        before = self.right
        super()._apply(fn, recurse)
        if torch.finfo(self.right.dtype).bits < 32:
            self.right = before.to(self.right.device)
        return self


def _first_right_singular_vector(weight: Tensor, vectors: int = 16, iterations: int = 40) -> Tensor:
    """Subspace iteration from a fixed start: within 1e-4 of the spectral norm for random matrices of width 1024."""
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (weight.shape[1], min(vectors, *weight.shape))
    basis = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    largest = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(weight.mT @ (weight @ basis))
        _, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
        converged = values[0] - largest <= torch.finfo(weight.dtype).eps * values[0]
        largest, found = values[0], basis @ right[0]
        if converged:
            break
    return found


def reparametrize(owners: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Put a ``SpectralGain`` on weights; what a model computes stays the same, up to rounding.

    Args:
        owners: for each weight's full name, the module that owns it and its name there.

    Raises:
        ValueError: if a weight is sharded already, zero or not finite.
    """
    for name, (owner, attribute) in owners.items():
        weight = getattr(owner, attribute)
        if isinstance(weight, DTensor):
            raise ValueError(
                f"`{name}` is sharded already, too late for SigmaReparam: call `SigmaReparam(...).insert(model)` in"
                " `configure_model`, after the model is built and before `fully_shard`."
            )
        try:
            spectral = SpectralGain(weight)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}. Leave it out with `exclude`, or initialise it.") from None
        spectral.train(owner.training)
        register_parametrization(owner, attribute, spectral)


def spectral_gains(module: nn.Module) -> Iterator[tuple[str, ParametrizationList, SpectralGain]]:
    """Find what ``reparametrize`` has put in: a plain weight's name, what holds it now, and its parametrisation."""
    for name, holder in module.named_modules():
        if isinstance(holder, ParametrizationList):
            for spectral in holder:
                if isinstance(spectral, SpectralGain):
                    yield _plain_name(f"{name}."), holder, spectral


def fold(module: nn.Module) -> None:
    """Turn the weights of a model back into plain ones, in place; what it computes stays the same.

    Raises:
        ValueError: if a weight is sharded.
    """
    for name, holder, _ in list(spectral_gains(module)):
        if isinstance(holder.original, DTensor):
            raise ValueError(f"`{name}` is sharded; gather the state dict and give that to `folded_state_dict`.")
        path, _, attribute = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        with torch.no_grad():
            weight, holder.original.data = holder.original, getattr(owner, attribute)
        del owner.parametrizations[attribute]
        if owner.parametrizations:
            delattr(type(owner), attribute)
        else:
            # back to the plain class; torch's own way would break copies of the model, which share the other class
            del owner.parametrizations
            owner.__class__ = type(owner).__bases__[0]
        owner.register_parameter(attribute, weight)


def folded_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state of a reparametrised model into that of a plain one, for export.

    Args:
        state_dict: full, that is gathered, parameters and buffers by name.

    Returns:
        The same entries, with one plain weight for each that had a gain; all others untouched.

    Example::

        >>> layer = nn.Linear(2, 2, bias=False)
        >>> reparametrize({"weight": (layer, "weight")})
        >>> list(layer.state_dict())
        ['parametrizations.weight.original', 'parametrizations.weight.0.gain', 'parametrizations.weight.0.right']
        >>> list(folded_state_dict(layer.state_dict()))
        ['weight']
    """
    plain = dict(state_dict)
    for name in state_dict:
        prefix = name.removesuffix("0.right")
        entries = [prefix + "original", prefix + "0.gain", name]
        if prefix == name or not all(entry in plain for entry in entries):
            continue
        weight, gain, right = (plain.pop(entry) for entry in entries)
        wide = weight.to(right.dtype)
        plain[_plain_name(prefix)] = (wide * (gain / torch.linalg.vector_norm(wide @ right))).to(weight.dtype)
    return plain


def _plain_name(prefix: str) -> str:
    """``"a.parametrizations.weight."`` to ``"a.weight"``."""
    return ".".join(part for part in prefix.split(".")[:-1] if part != "parametrizations")
