"""Training a student to predict as a teacher does: knowledge distillation (Hinton et al. 2015).

A pruned model that is fine-tuned with the dense one as its teacher learns from whole distributions over the next
token, and not only from the one token that the text has there.
"""

import inspect
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ..models.blocks import evaluation_mode
from ..models.divergence import distillation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_distillation(weight: float, temperature: float) -> None:
    """Raise `ValueError` if a setting is out of range."""
    if not 0 < weight <= 1:
        raise ValueError(f"weight must lie above 0 and at most at 1, but found {weight!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number above 0, but found {temperature!r}")


def distilled(
    model: "PreTrainedModel", teacher: "PreTrainedModel", weight: float = 0.5, temperature: float = 1.0
) -> "Distilled":
    """Let a model's own loss be (1 − weight)·loss + weight·T²·KL(teacher ‖ model) from now on.

    For any training loop that takes the `loss` of the Hugging Face model's output. In training mode, each call of the
    model also runs the teacher on the same tokens, without gradients and without dropout; in eval mode nothing
    changes. As a context it ends with the context, else with `remove()`.

    Args:
        model: The student, a causal language model.
        teacher: A causal language model with the same tokens, on the same device. It needs no gradients.
        weight: Share of the divergence in the loss, above 0 and at most 1. See `distillation_loss`.
        temperature: Softens both models' distributions.

    Raises:
        ValueError: A setting is out of range, or the vocabularies differ. In training: the model was called without
            labels, without token ids, or for a tuple.

    Example::

        with distilled(model, teacher), freeze(model):
            for batch in data:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    return Distilled(model, teacher, weight, temperature)


class Distilled:
    """A model's loss with a teacher in it, until `remove()`. See `distilled`.

    Attributes:
        kl: T²·KL of the last call in training mode, in nats per token, detached; None before it.
    """

    def __init__(self, model: "PreTrainedModel", teacher: "PreTrainedModel", weight: float, temperature: float) -> None:
        check_distillation(weight, temperature)
        mine, teachers = _vocabulary(model), _vocabulary(teacher)
        if mine != teachers:
            raise ValueError(
                f"the model predicts one of {mine:,} tokens but the teacher one of {teachers:,}: they must share their "
                f"tokenizer"
            )
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.kl: Tensor | None = None
        self._names = list(inspect.signature(model.forward).parameters)
        # The hook is a function and not the method, whose owner has the teacher: a copy of the model would copy it too.
        self._handle = model.register_forward_hook(lambda *call: self._after_forward(*call), with_kwargs=True)  # noqa: PLW0108

    def remove(self) -> None:
        """Give the model its own loss back."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _after_forward(
        self, model: "PreTrainedModel", positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if not model.training:
            return output
        given = {**dict(zip(self._names, positional, strict=False)), **named}
        labels, tokens = given.get("labels"), given.get("input_ids")
        if labels is None:
            raise ValueError("distillation changes the model's own loss, which it has with labels only: pass `labels`")
        if tokens is None:
            raise ValueError("distillation runs the teacher on the same tokens: pass `input_ids`, and no embeddings")
        if isinstance(output, tuple):
            raise ValueError("distillation needs the model's named output, not a tuple: leave out `return_dict=False`")
        # The teacher attends to the same tokens, at the same positions.
        same = {name: given[name] for name in ("attention_mask", "position_ids") if name in given}
        with torch.no_grad(), evaluation_mode(self.teacher):
            target = self.teacher(input_ids=tokens, **same, use_cache=False, return_dict=True).logits
        kl = distillation_loss(output.logits, target, labels, self.temperature)
        self.kl = kl.detach()
        output.loss = (1 - self.weight) * output.loss + self.weight * kl
        return output


def _vocabulary(model: "PreTrainedModel") -> int:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: it must be a causal language model")
    return len(head.weight)
