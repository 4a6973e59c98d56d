"""The one error of this package."""

from __future__ import annotations


class MaskError(ValueError):
    """A mask, pattern or weight that does not fit; the message names it and says what would."""
