"""Dense weights that make up for the error of what was pruned before them.

With inputs X (tokens, in) of a layer in the pruned model, X_d in the dense one and c between 0 and 1, the weight

    W1 = argmin ‖X Wᵀ − (X + c (X_d − X)) W0ᵀ‖² + μ ‖(W − W0) diag(d)‖²
       = W0 + c W0 Eᵀ (G + μ diag(d)²)⁻¹,   E = Xᵀ(X_d − X)

is what a solver prunes in place of W0: its own objective with W1 as the dense weight is this one, but for a constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MAIHTConfig
from .problem import ScaledGram


@dataclass(frozen=True)
class Correction:
    """What the layers that share an input need for it.

    Args:
        lower: Cholesky factor of C + μI (in, in).
        inverse_norms: diag(d)⁻¹ (in,); 0 for dead features.
        drift: c · E (in, in).
    """

    lower: Tensor
    inverse_norms: Tensor
    drift: Tensor

    @classmethod
    def prepare(cls, gram: ScaledGram, drift: Tensor, config: MAIHTConfig) -> "Correction":
        """Factorise C + μI.

        Raises:
            FloatingPointError: It is not positive definite.
        """
        damped = gram.correlation.clone()
        damped.diagonal().add_(config.mu)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            raise FloatingPointError(
                f"the Gram matrix could not be factorised in {damped.dtype} (minor {int(info)} of {len(damped)} is not "
                f"positive definite, with μ = {config.mu}): raise mu, or set dense_targets = 0"
            )
        inverse = torch.where(gram.norms > 0, gram.norms.reciprocal(), 0)
        return cls(lower, inverse, drift.to(damped.dtype) * config.dense_targets)

    def apply(self, weight: Tensor) -> Tensor:
        """W1 for W0 (out, in), in the dtype of the Gram matrix."""
        dense = weight.to(self.drift.dtype)
        right = (self.drift @ dense.T).mul_(self.inverse_norms[:, None])  # diag(d)⁻¹ c E W0ᵀ (in, out)
        change = torch.cholesky_solve(right, self.lower).mul_(self.inverse_norms[:, None])
        return dense + change.T
