"""Features to one number an image, higher = more OOD.

Write one of your own with :class:`Score` and :func:`register`.
"""

from . import baselines as _baselines  # noqa: F401 (registers its scores)
from . import logits as _logits  # noqa: F401
from . import nearest as _nearest  # noqa: F401
from .registry import Context, Features, Score, register

__all__ = ["Context", "Features", "Score", "register"]
