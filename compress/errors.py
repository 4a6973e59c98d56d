"""The errors a user can meet. Each says what happened and what to do; the command line turns `exit_code` into its own."""

from __future__ import annotations


class CompressError(Exception):
    """Something failed although the request was sound (exit code 1)."""

    exit_code = 1


class UsageError(CompressError):
    """The request itself is at fault: an argument, a recipe, a path, a pattern, a shape (exit code 2)."""

    exit_code = 2


class VerificationError(CompressError):
    """A result is not what it claims to be (exit code 3)."""

    exit_code = 3
