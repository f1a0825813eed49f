"""The errors of this package: each says what was given, what is needed and what to do."""

from __future__ import annotations


class QwenoptError(RuntimeError):
    """Base of every error that qwenopt raises on its own account."""


class OptionError(QwenoptError, ValueError):
    """An option that does not exist or a value that it does not take."""


class MissingNative(QwenoptError):
    """Something was asked for that only the native extension has, and it cannot be used."""


class CheckpointError(QwenoptError):
    """A checkpoint that is incomplete, damaged or of another architecture."""
