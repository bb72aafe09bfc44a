"""Lets a loaded Hugging Face causal language model compute the loss of its ``labels`` without logits.

The model's own ``forward`` still runs, so caches, hidden states, attentions and a mixture's router loss come from it.
Only its output head keeps the hidden states in place of computing logits, and its ``loss_function`` takes them then.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from litropy.losses import CutCrossEntropyLoss
from litropy.losses.head_inputs import Impl
from litropy.losses.modes import Mode
from litropy.recipes.causal_lm import next_token_targets
from litropy.recipes.head_loss import LossOptions, head_loss
from litropy.recipes.head_tap import HeadTap, own_forward, restore_attribute
from litropy.recipes.lora_head import active_head
from litropy.recipes.output_head import OutputHead, find_output_head, inner_causal_lm

__all__ = ["patch_causal_lm", "unpatch_causal_lm"]

Model = TypeVar("Model", bound=nn.Module)

# the attribute of a patched model that holds its patch
_MARK = "_litropy_patch"


class _TappedLoss:
    """In place of a model's ``loss_function``: takes hidden states from an open tap, else calls the model's."""

    def __init__(self, tap: HeadTap, info: OutputHead, own: Callable[..., Tensor], options: LossOptions) -> None:
        self.tap = tap
        self.info = info
        self.own = own
        self.options = options

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        if not self.tap.is_open:
            return self.own(logits, labels, vocab_size, **kwargs)
        hidden = self.tap.hidden
        if hidden is None:
            raise ValueError(
                "The `forward` of the output head was replaced after the model was patched. Call"
                " unpatch_causal_lm(model), then patch_causal_lm(model) again."
            )
        ignore_index, shifted = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
        targets = next_token_targets(labels, ignore_index) if shifted is None else shifted.reshape(hidden.shape[:-1])
        num_items = kwargs.get("num_items_in_batch")
        options: LossOptions = {**self.options, "num_items": num_items, "ignore_index": ignore_index}
        return head_loss(self.tap.head, self.info, hidden, targets, **options)[0]


class _Patch:
    """In place of a model's ``forward``: opens the tap where the loss needs no logits."""

    def __init__(self, model: Any, info: OutputHead, in_eval: bool, options: LossOptions) -> None:
        self.model = model
        self.head_name = info.head
        self.in_eval = in_eval
        self.enabled = True
        head = model.get_submodule(info.head)
        self.tap = HeadTap(head, active_head(head).linear.weight.shape[0])
        self.loss = _TappedLoss(self.tap, info, model.loss_function, options)
        self.previous = vars(model).get("forward")
        self.previous_loss = vars(model).get("_loss_function")
        self.names = list(inspect.signature(model.forward).parameters)
        # the signature that trainers and generation look at
        self.__wrapped__ = model.forward

    def install(self) -> None:
        self.model.forward = self
        self.model.loss_function = self.loss
        self.tap.install()
        setattr(self.model, _MARK, self)

    def remove(self) -> None:
        model = self.model
        delattr(model, _MARK)
        # a wrapper that something has put around this since (autocast, by accelerate) stays, and finds the model's own
        self.enabled = False
        if vars(model).get("forward") is self:
            restore_attribute(model, "forward", self.previous)
        if vars(model).get("_loss_function") is self.loss:
            restore_attribute(model, "_loss_function", self.previous_loss)
        self.tap.remove()
        for module in model.modules():  # copies of the head have copies of the tap
            tap = vars(module).get("forward")
            if isinstance(tap, HeadTap):
                tap.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # accelerate binds what it finds beneath its wrappers to the model
            args = args[1:]
        own = own_forward(self.model, self.previous)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if not self.enabled or given.get("labels") is None or not (self.model.training or self.in_eval):
            return own(*args, **kwargs)
        self._check(given)
        as_dict = given.pop("return_dict", None)
        if as_dict is None:
            as_dict = self.model.config.return_dict
        self.tap.is_open = True
        try:
            output = own(**given, return_dict=True)
        finally:
            self.tap.close()
        if as_dict:
            return type(output)(**{name: value for name, value in output.items() if name != "logits"})
        return tuple(None if name == "logits" else value for name, value in output.items())

    def _check(self, given: dict[str, Any]) -> None:
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep:
            raise ValueError(
                f"`logits_to_keep` is {keep}, but a call with `labels` computes no logits; leave it out, or"
                " unpatch_causal_lm(model) first."
            )
        if self.model.get_submodule(self.head_name) is not self.tap.head or self.model.loss_function is not self.loss:
            raise ValueError(
                f"The output head or the loss function of {type(self.model).__name__} is another one than when it was"
                " patched. Call unpatch_causal_lm(model), then patch_causal_lm(model) again: PEFT and a resized"
                " vocabulary come before the patch."
            )


def patch_causal_lm(
    model: Model,
    *,
    in_eval: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    skip_tol: float = 0.0,
    mode: Mode = "auto",
    memory_budget_mib: float = 64,
    impl: Impl = "auto",
) -> Model:
    """Let ``model(input_ids, labels=...)`` compute its loss without logits, in place.

    The loss is the model's own, computed by ``linear_cross_entropy``: softcap, logit scale, router loss,
    ``num_items_in_batch``, ``shift_labels`` and ``ignore_index`` count as they do in the model. The output is the
    model's but for ``logits``, which is None. Calls without labels are untouched, generation included, and so are calls
    in eval mode unless ``in_eval``. A batch in which nothing is to be predicted has the loss 0, not NaN.

    Everything is replaced on the instance: copies, pickles and ``save_pretrained`` work as before. Patch after wrapping
    with PEFT or resizing the vocabulary, and before ``torch.compile`` or distributed wrappers.

    Args:
        model: a loaded ``...ForCausalLM``, or the ``PeftModel`` around one.
        in_eval: whether calls with labels in eval mode get no logits either.
        label_smoothing: share of the loss that goes to the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp, which keeps logits from drifting; 1e-4 is usual.
        skip_tol: the largest share of a token's softmax mass that the backward pass may leave out; 0 is exact.
        mode: ``"fast"``, ``"lean"`` or ``"auto"``, as in ``linear_cross_entropy``.
        memory_budget_mib: workspace of the loss, in MiB.
        impl: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU, PyTorch on a CPU.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is patched already, is no Hugging Face causal language model, or does something between
            its hidden states and its loss that is not understood; in a call with labels, if ``logits_to_keep`` is set
            or the output head has changed since.

    Example::

        >>> from litropy.testing import tiny_causal_lm
        >>> model = patch_causal_lm(tiny_causal_lm("llama").train())
        >>> ids = torch.arange(12)[None]
        >>> output = model(input_ids=ids, labels=ids)
        >>> print(output.logits, round(output.loss.item(), 2))
        None 4.53
    """
    options: LossOptions = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "skip_tol": skip_tol,
        "mode": mode,
        "memory_budget_mib": memory_budget_mib,
        "impl": impl,
    }
    # refuses options out of range
    CutCrossEntropyLoss(
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        skip_tol=skip_tol,
        mode=mode,
        memory_budget_mib=memory_budget_mib,
    )
    causal_lm = _causal_lm(model)
    if _MARK in vars(causal_lm):
        raise ValueError(
            f"This {type(causal_lm).__name__} is patched already; to change options, unpatch_causal_lm(model) first."
        )
    _check_loss(causal_lm)
    _Patch(causal_lm, find_output_head(causal_lm), in_eval, options).install()
    return model


def unpatch_causal_lm(model: Model) -> Model:
    """Undo ``patch_causal_lm``: what was there before is there again.

    Args:
        model: what was patched.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is not patched.
    """
    causal_lm = _causal_lm(model)
    if _MARK not in vars(causal_lm):
        raise ValueError(f"This {type(causal_lm).__name__} is not patched; patch_causal_lm(model) patches it.")
    vars(causal_lm)[_MARK].remove()
    return model


def _check_loss(causal_lm: nn.Module) -> None:
    """ValueError if the model's ``forward`` computes its loss itself, as some did in older versions of transformers."""
    code = getattr(inspect.unwrap(type(causal_lm).forward), "__code__", None)
    if code is not None and {"CrossEntropyLoss", "cross_entropy"} & {*code.co_names}:
        import transformers

        raise ValueError(
            f"`forward` of {type(causal_lm).__name__} computes its loss from logits itself, in place of calling the"
            f" model's `loss_function`, in transformers {transformers.__version__}. A newer version may do so."
        )


def _causal_lm(model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    causal_lm = inner_causal_lm(model)
    if not isinstance(causal_lm, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no Hugging Face model; pass the ...ForCausalLM itself, before torch.compile,"
            " DDP or another wrapper."
        )
    return causal_lm
