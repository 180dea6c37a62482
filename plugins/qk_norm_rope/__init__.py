"""The qk_norm_rope op: description, reference, kernel."""
