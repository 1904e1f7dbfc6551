"""Whether accumulating is one large batch, for somebody's own model and rows: the gradients themselves, compared."""

from .report import Measured, Verification
from .verifying import verify

__all__ = ["Measured", "Verification", "verify"]
