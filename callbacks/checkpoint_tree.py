"""Everything in a checkpoint that is not a tensor, as JSON: no pickle is written, and none is ever read."""

import base64
import math
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor, nn

__all__ = ["Json", "flatten_tree", "unflatten_tree"]

Json = Any

_MOST_NESTING = 200
_TAG = "$"
_ALLOWED = (
    "Allowed are tensors, None, bool, int, float, str, bytes, complex, list, tuple, dict, set, Counter, deque, Path,"
    " timedelta, NumPy numbers and arrays, torch.Size, torch.dtype and torch.device"
)


def flatten_tree(tree: Any) -> tuple[Json, dict[str, Tensor]]:
    """Split nested state into JSON and named tensors.

    A tensor is named by its path: ``{"state_dict": {"w": t}}`` holds ``state_dict/w``. Exact types survive, as do the
    order of dicts, keys that are no strings, NaN and infinities.

    Args:
        tree: a Lightning checkpoint, or any nested state.

    Returns:
        What ``json.dumps`` takes, and the tensors.

    Raises:
        ValueError: for an object that neither JSON nor a tensor can hold, with its path.

    Example::

        >>> flatten_tree({"betas": (0.9, 0.95), "w": torch.zeros(2)})
        ({'betas': {'$': 'tuple', 'v': [0.9, 0.95]}, 'w': {'$': 'tensor', 'v': 'w'}}, {'w': tensor([0., 0.])})
    """
    tensors: dict[str, Tensor] = {}
    return _Encoder(tensors).encode(tree, ()), tensors


def unflatten_tree(json: Json, tensor_named: Callable[[str], Tensor]) -> Any:
    """Build nested state again from JSON and tensors.

    Args:
        json: from :func:`flatten_tree`.
        tensor_named: gives the tensor of a name.

    Returns:
        The state, with the types that it had.

    Raises:
        ValueError: if the JSON is not of that form, with the path.

    Example::

        >>> unflatten_tree({"betas": {"$": "tuple", "v": [0.9, 0.95]}}, {}.__getitem__)
        {'betas': (0.9, 0.95)}
    """
    return _Decoder(tensor_named).decode(json, ())


def _spell(path: tuple[Any, ...]) -> str:
    return "checkpoint" + "".join(f"[{key!r}]" for key in path)


class _Encoder:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def encode(self, value: Any, path: tuple[Any, ...]) -> Json:
        if len(path) > _MOST_NESTING:
            raise ValueError(f"{_spell(path[:5])}... is nested over {_MOST_NESTING} deep, or holds itself.")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else _tagged("float", struct.pack("<d", value).hex())
        if kind is list:
            return self._items(value, path)
        if kind is dict and all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if kind in _SEQUENCES:
            return _tagged(_SEQUENCES[kind], self._items(value, path))
        if kind in _MAPPINGS:
            return self._mapping(_MAPPINGS[kind], value, path)
        if kind is Namespace:
            return self._mapping("namespace", vars(value), path)
        if isinstance(value, Path):
            return _tagged("path", str(value))
        if kind in _LEAVES:
            name, spell = _LEAVES[kind]
            return _tagged(name, spell(value))
        raise ValueError(
            f"{_spell(path)} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored without pickle."
            f" {_ALLOWED}. Leave it out (a hyper-parameter: save_hyperparameters(ignore=[...])), or let"
            " `state_dict` or `on_save_checkpoint` return what describes it."
        )

    def _items(self, values: Any, path: tuple[Any, ...]) -> list[Json]:
        return [self.encode(item, (*path, index)) for index, item in enumerate(values)]

    def _mapping(self, name: str, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Json:
        items = [[self.encode(key, (*path, key)), self.encode(item, (*path, key))] for key, item in value.items()]
        # torch keeps the versions of modules on the state dict itself
        metadata = getattr(value, "_metadata", None) if name == "ordered" else None
        extra = {} if metadata is None else {"m": self.encode(metadata, (*path, "_metadata"))}
        return {**_tagged(name, items), **extra}

    def _tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Json:
        name = base = "/".join(str(key) for key in path) or "tensor"
        count = 1
        while name in self._tensors or name == "__metadata__":
            count += 1
            name = f"{base}#{count}"
        self._tensors[name] = tensor.detach()
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
        return _tagged(kind, name) | ({"grad": True} if tensor.requires_grad else {})

    def _numpy(self, value: "np.ndarray[Any, Any] | np.generic", path: tuple[Any, ...]) -> Json:
        if value.dtype.hasobject or value.dtype.names:
            raise ValueError(
                f"{_spell(path)} is a NumPy array of {value.dtype}, which cannot be stored without pickle."
            )
        array = np.ascontiguousarray(value)
        data = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
        kind = "scalar" if isinstance(value, np.generic) else "array"
        shape = list(np.shape(value))
        return {**_tagged(kind, self._tensor(data, path)["v"]), "dtype": value.dtype.str, "shape": shape}


def _tagged(name: str, value: Json) -> dict[str, Json]:
    return {_TAG: name, "v": value}


_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque", torch.Size: "size"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter", AttributeDict: "attributes"}
_LEAVES: dict[type, tuple[str, Callable[[Any], Json]]] = {
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
    complex: ("complex", lambda value: struct.pack("<dd", value.real, value.imag).hex()),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
}


# what Python says of values that are not of the form that their tag promises
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError, struct.error)


class _Decoder:
    def __init__(self, tensor_named: Callable[[str], Tensor]) -> None:
        self._tensor_named = tensor_named

    def decode(self, json: Json, path: tuple[Any, ...]) -> Any:
        if len(path) > _MOST_NESTING:
            raise ValueError(f"{_spell(path[:5])}... is nested over {_MOST_NESTING} deep.")
        if isinstance(json, list):
            return [self.decode(item, (*path, index)) for index, item in enumerate(json)]
        if not isinstance(json, dict):
            return json
        if _TAG not in json:
            return {key: self.decode(item, (*path, key)) for key, item in json.items()}
        if json[_TAG] in ("tensor", "parameter"):
            tensor = self._tensor_named(str(json.get("v")))
            grad = bool(json.get("grad"))
            return nn.Parameter(tensor, grad) if json[_TAG] == "parameter" else tensor.requires_grad_(grad)
        try:
            return self._tagged(json[_TAG], json["v"], json, path)
        except _DAMAGE as error:
            if isinstance(error, ValueError) and str(error).startswith("checkpoint["):
                raise
            raise ValueError(f"{_spell(path)}: {json[_TAG]!r} is damaged or unknown ({error}).") from error

    def _tagged(self, name: str, value: Json, json: Json, path: tuple[Any, ...]) -> Any:
        if name in ("array", "scalar"):
            return self._numpy(value, json)
        if name in _MAKE_SEQUENCE:
            return _MAKE_SEQUENCE[name](self.decode(value, path))
        if name in _MAKE_MAPPING or name == "namespace":
            items = [(self.decode(key, path), self.decode(item, (*path, str(key)))) for key, item in value]
            made = Namespace(**dict(items)) if name == "namespace" else _MAKE_MAPPING[name](items)
            if "m" in json:
                made._metadata = self.decode(json["m"], path)
            return made
        return _MAKE_LEAF[name](value)

    def _numpy(self, name: str, json: Json) -> Any:
        dtype = np.dtype(json["dtype"])
        if dtype.hasobject or dtype.names:
            raise TypeError(f"dtype {dtype} is not allowed")
        data = self._tensor_named(name).numpy().tobytes()
        array = np.frombuffer(data, dtype).reshape(json["shape"]).copy()
        return array[()] if json[_TAG] == "scalar" else array


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


_MAKE_SEQUENCE: dict[str, Callable[[Any], Any]] = {
    name: torch.Size if cls is torch.Size else cls for cls, name in _SEQUENCES.items()
}
_MAKE_MAPPING: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda items: Counter(dict(items)),
    "attributes": lambda items: AttributeDict(dict(items)),
}
_MAKE_LEAF: dict[str, Callable[[Any], Any]] = {
    "float": lambda value: struct.unpack("<d", bytes.fromhex(value))[0],
    "bytes": lambda value: base64.b64decode(value, validate=True),
    "complex": lambda value: complex(*struct.unpack("<dd", bytes.fromhex(value))),
    "path": Path,
    "dtype": _dtype,
    "device": torch.device,
    "timedelta": lambda value: timedelta(*value),
}
