"""Training a student to predict as a teacher does: knowledge distillation (Hinton et al. 2015).

A pruned model that is fine-tuned with the dense one as its teacher learns from whole distributions over the next
token, and not only from the one token that the text has there.
"""

import inspect
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..models.blocks import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Hugging Face's labels have this value where nothing is to be predicted.
_IGNORED = -100

# Logits (tokens, vocabulary) are turned to float32 so many at a time: 16 MiB per copy, whatever the vocabulary.
_CHUNK_ELEMENTS = 2**22


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean of T²·KL(teacher ‖ student) over the predicted tokens, with both distributions softened by T.

    As in a Hugging Face model's own loss, the logits at one position predict the label at the next, and labels of
    -100 are left out. T² keeps the gradient's size as T grows (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
    It is computed from log-softmax in float32, some tokens at a time, and again in the backward pass, so that float32
    copies of all logits never exist.

    Args:
        student_logits: (batch, tokens, vocabulary), any floating dtype.
        teacher_logits: The same shape; no gradient flows into them.
        labels: (batch, tokens), int64, not shifted.
        temperature: T, which divides both models' logits.

    Returns:
        A float32 scalar in nats per token; NaN if nothing is predicted, as the model's own loss is.

    Raises:
        ValueError: The shapes do not fit.
    """
    shape = student_logits.shape
    if len(shape) != 3 or teacher_logits.shape != shape or labels.shape != shape[:2]:
        raise ValueError(
            "logits must have shape (batch, tokens, vocabulary), the same for student and teacher, and labels "
            f"(batch, tokens), but found {tuple(shape)}, {tuple(teacher_logits.shape)} and {tuple(labels.shape)}"
        )
    predicted = labels[:, 1:].to(student_logits.device) != _IGNORED
    rows = max(1, _CHUNK_ELEMENTS // shape[-1])
    total = torch.zeros((), device=student_logits.device)
    # A sequence has student's and teacher's logits (tokens, vocabulary) and whether each token is predicted (tokens,).
    for sequence in zip(student_logits[:, :-1], teacher_logits[:, :-1].detach(), predicted, strict=True):
        for part in zip(*(tensor.split(rows) for tensor in sequence), strict=True):
            total = total + checkpoint(_divergence, *part, temperature, use_reentrant=False, preserve_rng_state=False)
    return temperature**2 * total / predicted.sum()


def _divergence(student: Tensor, teacher: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    student, teacher = (
        functional.log_softmax(logits[predicted].float() / temperature, dim=-1) for logits in (student, teacher)
    )
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


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
