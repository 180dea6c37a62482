"""The ops upsample_*, duplicate_up* and encode_*: description, reference, kernels."""
