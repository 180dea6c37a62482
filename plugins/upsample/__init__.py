"""The ops upsample_space, upsample_time, duplicate_up and duplicate_up_time: description, reference, kernels."""
