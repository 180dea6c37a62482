"""The qk_norm_rope op: reference, kernel, plugin."""
