"""The version, readable without importing torch."""

from __future__ import annotations

__version__ = "0.1.0"
