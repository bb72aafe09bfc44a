"""See the queries and keys of every attention call of a model, without changing what it computes.

While a capture is open, three things are patched: the look-up of attention functions in transformers,
``scaled_dot_product_attention``, and ``softmax`` (for models that store their logits). The last capture that closes
restores them all.
"""

import functools
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litropy.callbacks import attention_arguments as arguments
from litropy.callbacks.attention_call import AttentionCall, Source, layer_number

__all__ = ["AttentionCapture", "attention_modules", "capture_attention", "path_in_model", "report_attention"]

_SOURCES: tuple[Source, ...] = ("interface", "scaled_dot_product_attention", "softmax", "reported")
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")

_Read = Callable[[nn.Module], dict[str, Any] | None]
_Wrap = Callable[[Any], Any]

_captures: list["AttentionCapture"] = []
_patches: dict[tuple[int, str], tuple[Any, str, Any]] = {}
_thread = threading.local()
_INHERITED = object()


class AttentionCapture:
    """An open capture; ``close`` it, or use it as a context manager. See ``capture_attention``.

    Attributes:
        without_gradients: whether calls under ``torch.no_grad`` count, which generation and evaluation make.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        recomputations: bool,
        without_gradients: bool,
        sources: Collection[Source],
    ) -> None:
        self.without_gradients = without_gradients
        self._on_call = on_call
        self._recomputations = recomputations
        self._sources = sources
        self._modules = {id(module): (module, path_in_model(name)) for name, module in model.named_modules()}
        self._targets = list(_targets([module for module, _ in self._modules.values()], sources))

    def open(self) -> None:
        """Go on after ``close``."""
        if self not in _captures:
            _captures.append(self)
            for owner, name, wrap in self._targets:
                _patch(owner, name, wrap)

    def close(self) -> None:
        """See no more calls; closing twice is fine."""
        if self in _captures:
            _captures.remove(self)
        if not _captures:
            _restore()

    def __enter__(self) -> "AttentionCapture":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _offer(
        self, source: Source, module: nn.Module | None, read: Callable[[nn.Module], dict[str, Any] | None]
    ) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # only inside of a backward pass
        if source not in self._sources or (recomputed and not self._recomputations):
            return
        if not (torch.is_grad_enabled() or self.without_gradients):
            return
        module, name = self._modules.get(id(module), (None, "")) if module is not None else self._caller()
        if module is None or (source == "softmax" and not _is_attention(module, name)):
            return
        found = read(module)
        if found is not None:
            layer = layer_number(module, name)
            self._on_call(
                AttentionCall(module=module, name=name, layer=layer, source=source, recomputed=recomputed, **found)
            )

    def _caller(self) -> tuple[nn.Module | None, str]:
        """The innermost module of the model whose method is running."""
        frame = sys._getframe(2)
        while frame is not None:
            found = self._modules.get(id(frame.f_locals.get("self")))
            if found is not None and not isinstance(found[0], nn.Softmax):
                return found
            frame = frame.f_back  # type: ignore[assignment]
        return None, ""


def capture_attention(
    model: nn.Module,
    on_call: Callable[[AttentionCall], None],
    *,
    recomputations: bool = False,
    without_gradients: bool = False,
    sources: Collection[Source] = _SOURCES,
) -> AttentionCapture:
    """Call a function for every attention call of a model, before attention itself runs.

    Sees models that use transformers' attention interface (eager, sdpa, flash, flex), that call
    ``scaled_dot_product_attention`` (``nn.MultiheadAttention`` among them), that take a softmax over stored logits in a
    module named attention, and calls of ``report_attention``. The record's tensors carry gradients; what the model
    computes is unchanged. Compiled code breaks its graph at these calls while a capture is open, and is compiled again
    when one opens: keep a capture open, or close it while compiled code runs.

    Args:
        model: whose calls to see; other models are left alone.
        on_call: takes an ``AttentionCall``.
        recomputations: also see the calls that activation checkpointing repeats in the backward pass. A function that
            builds a graph on q and k needs this: the repetition has to do what the first pass did.
        without_gradients: also see calls under ``torch.no_grad``: those of generation, evaluation, reference models and
            the first pass of reentrant checkpointing.
        sources: which kinds of calls to see, as ``AttentionCall.source`` names them.

    Returns:
        The open capture: a context manager, or ``close`` it.

    Raises:
        ValueError: if ``sources`` names an unknown kind.

    Example::

        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> with capture_attention(layer, lambda call: print(call.name, tuple(call.q.shape))):
        ...     _ = layer(torch.zeros(3, 5, 8))
        self_attn (3, 2, 5, 4)
    """
    if unknown := sorted(set(sources) - set(_SOURCES)):
        raise ValueError(f"`sources` holds {', '.join(unknown)}; choose from {', '.join(_SOURCES)}.")
    capture = AttentionCapture(model, on_call, recomputations, without_gradients, sources)
    capture.open()
    return capture


def report_attention(module: nn.Module, q: Tensor, k: Tensor, **options: Any) -> None:
    """Show a call of attention that no capture sees by itself: put this line into the ``forward`` of your module.

    Does nothing, and costs nothing, unless a capture is open.

    Args:
        module: the attention module, ``self``.
        q: queries as they enter the product, [B, H, Tq, D].
        k: keys, [B, Hkv, Tk, D].
        **options: other fields of ``AttentionCall``: ``scale``, ``causal``, ``window``, ``softcap``, ``sinks``,
            ``mask``, ``bias``, ``key_mask``, ``segment_ids``, ``key_segment_ids``.
    """
    if torch.compiler.is_compiling() or not _captures:
        return
    _show("reported", module, lambda _: arguments.of_reported(q, k, options))


def attention_modules(model: nn.Module) -> dict[str, str]:
    """Modules inside of a model that look like attention by their name: their paths, and the names of their classes."""
    return {
        path_in_model(name): type(module).__name__
        for name, module in model.named_modules()
        if name and _is_attention(module, name)
    }


def path_in_model(name: str) -> str:
    """Path of a module without the wrappers that strategies and compilers put into it.

    Example::

        >>> path_in_model("model._orig_mod.layers.0")
        'model.layers.0'
    """
    return _WRAPPERS.sub("", f"{name}.").removesuffix(".")


def _is_attention(module: nn.Module, name: str) -> bool:
    """Whether the class is named attention, or the attribute and it is made of other modules (not a norm, say)."""
    tail = name.rpartition(".")[2] if next(module.children(), None) is not None else ""
    return bool(re.search("attention|attn", f"{type(module).__name__} {tail}", re.IGNORECASE))


def _show(source: Source, module: nn.Module | None, read: _Read) -> None:
    """Offer a call to all captures; those that their functions make are not seen."""
    if getattr(_thread, "inside", False):
        return
    with _inside():
        for capture in tuple(_captures):
            capture._offer(source, module, read)


@contextmanager
def _inside() -> Iterator[None]:
    """What runs in here belongs to a call that has been seen."""
    before, _thread.inside = getattr(_thread, "inside", False), True
    try:
        yield
    finally:
        _thread.inside = before


# what is patched


def _targets(modules: Iterable[nn.Module], sources: Collection[Source]) -> Iterator[tuple[Any, str, _Wrap]]:
    """What has to be patched for models made of these modules: owner, name, and what wraps it."""
    files = {sys.modules.get(base.__module__) for module in modules for base in type(module).__mro__}
    files -= {None, F, torch}
    if "scaled_dot_product_attention" in sources:
        yield F, "scaled_dot_product_attention", _show_sdpa
        yield from _imports(files, _original(F, "scaled_dot_product_attention"), _show_sdpa)
    if "softmax" in sources:
        for owner in (F, torch, torch.Tensor):
            yield owner, "softmax", _show_softmax
        yield from _imports(files, _original(F, "softmax"), _show_softmax)
    transformers: ModuleType | None = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and "interface" in sources:
        yield transformers.AttentionInterface, "__getitem__", _tap_item
        yield transformers.AttentionInterface, "get_interface", _tap_interface
        for file in files:
            if callable(getattr(file, "eager_attention_forward", None)):
                yield file, "eager_attention_forward", lambda function: _tap(function, "eager")


def _imports(files: Iterable[Any], function: Any, wrap: _Wrap) -> Iterator[tuple[Any, str, _Wrap]]:
    """Where a function has been imported by name."""
    for file in files:
        yield from ((file, name, wrap) for name, value in vars(file).items() if value is function)


def _patch(owner: Any, name: str, wrap: _Wrap) -> None:
    key = (id(owner), name)
    if key not in _patches:
        _patches[key] = (owner, name, vars(owner).get(name, _INHERITED))
        setattr(owner, name, wrap(getattr(owner, name)))


def _original(owner: Any, name: str) -> Any:
    patch = _patches.get((id(owner), name))
    return getattr(owner, name) if patch is None else patch[2]


def _restore() -> None:
    while _patches:
        _, (owner, name, original) = _patches.popitem()
        if original is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _show_sdpa(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.compiler.disable
    @functools.wraps(function)
    def scaled_dot_product_attention(*args: Any, **options: Any) -> Tensor:
        _show("scaled_dot_product_attention", None, lambda _: arguments.of_sdpa(*args, **options))
        return function(*args, **options)

    return scaled_dot_product_attention


def _show_softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.compiler.disable
    @functools.wraps(function)
    def softmax(input: Tensor, *args: Any, **options: Any) -> Tensor:
        dim = args[0] if args else options.get("dim")
        _show("softmax", None, lambda module: arguments.of_softmax(module, input, dim))
        with _inside():
            return function(input, *args, **options)

    return softmax


def _tap_interface(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable
    @functools.wraps(get_interface)
    def tapped(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = get_interface(self, attn_implementation, default)
        return _tap(function, "eager" if function is default else _kind(attn_implementation))

    return tapped


def _tap_item(getitem: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable
    @functools.wraps(getitem)
    def tapped(self: Any, key: str) -> Callable[..., Any]:
        return _tap(getitem(self, key), _kind(key))

    return tapped


def _kind(implementation: str) -> arguments.Kind:
    """Whose conventions an attention function registered under a name follows."""
    if "flash" in implementation:
        return "flash"
    if "flex" in implementation:
        return "flex"
    return "eager" if "eager" in implementation else "sdpa"


@functools.cache
def _tap(function: Callable[..., Any], kind: arguments.Kind) -> Callable[..., Any]:
    """An attention function that is seen when it is called."""
    if getattr(function, "_is_tap", False):
        return function
    names = ("module", "query", "key", "value", "attention_mask")

    @torch.compiler.disable
    @functools.wraps(function)
    def tapped(*args: Any, **options: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | options
        module, query, key, _, mask = (given.pop(name, None) for name in names)
        _show("interface", module, lambda _: arguments.of_interface(kind, module, query, key, mask, given))
        # while a model runs uncompiled, flex attention still has to be compiled, or it would store all logits
        flex = torch.compiler.set_stance("default") if kind == "flex" else nullcontext()
        with _inside(), flex:
            return function(*args, **options)

    tapped._is_tap = True
    return tapped
