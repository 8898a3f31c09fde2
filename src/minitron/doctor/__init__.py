"""What this machine and this installation have, what is missing, and what to do about it."""

from .examine import examine
from .finding import Finding

__all__ = ["Finding", "examine"]
