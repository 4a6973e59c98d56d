"""Exports: one module a format, each ending in a proof that what was written is what was meant."""
