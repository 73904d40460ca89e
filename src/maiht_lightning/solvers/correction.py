"""Dense weights that make up for the error of what was pruned before them.

With inputs X (tokens, in) of a layer in the pruned model, X_d in the dense one and c between 0 and 1, the weight

    W1 = argmin ‖X Wᵀ − (X + c (X_d − X)) W0ᵀ‖² + μ ‖(W − W0) diag(d)‖²
       = W0 + c W0 Eᵀ (G + μ diag(d)²)⁻¹,   E = Xᵀ(X_d − X)

is what a solver prunes in place of W0: its own objective with W1 as the dense weight is this one, but for a constant.
With C of `problem` it is W0 + W0 K diag(d)⁻¹, where K = c Eᵀ diag(d)⁻¹ (C + μI)⁻¹.
"""

from dataclasses import dataclass

from torch import Tensor

from .config import MAIHTConfig
from .inverse import shifted_inverse
from .precision import Multiplier, final_form
from .problem import ScaledGram, reciprocal_of


@dataclass(frozen=True)
class Correction:
    """What the layers that share an input need for it.

    Args:
        multiply: Products with K (in, in).
        reciprocal: diag(d)⁻¹ (in,); 0 for dead features.
    """

    multiply: Multiplier
    reciprocal: Tensor

    @classmethod
    def prepare(cls, gram: ScaledGram, drift: Tensor, config: MAIHTConfig) -> "Correction":
        """Compute K from E (in, in).

        Raises:
            FloatingPointError: C + μI is not positive definite.
        """
        form = final_form(config.precision)
        inverse = shifted_inverse(
            gram.correlation,
            config.mu,
            form,
            who="The dense targets' correction",
            tried=f"μ = {config.mu}",
            advice="raise mu, or set dense_targets = 0",
        )
        reciprocal = reciprocal_of(gram.norms)
        right = (drift.to(inverse.dtype).T * reciprocal).mul_(config.dense_targets)
        return cls(Multiplier(Multiplier(inverse, form)(right), form), reciprocal)

    def apply(self, weight: Tensor) -> Tensor:
        """W1 for W0 (out, in), in the dtype of the Gram matrix."""
        dense = weight.to(self.reciprocal.dtype)
        return self.multiply(dense).mul_(self.reciprocal).add_(dense)
