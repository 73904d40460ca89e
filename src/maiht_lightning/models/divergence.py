"""How far one language model's predictions are from another's, token by token."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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
