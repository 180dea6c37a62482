"""Attention over slots with lengths."""
