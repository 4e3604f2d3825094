"""The small worlds, once for all tests of distillation."""

from __future__ import annotations

from distill_world import digits_cache, digits_world, text_world

__all__ = ["digits_cache", "digits_world", "text_world"]
