"""The user's error: what a command answers with one line and exit code 2, where a bug of ours stays a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user, or a file that cannot be used; one line that names it and says what would work."""
