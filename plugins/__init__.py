"""Custom ops: one folder an op (description, reference, kernel), the NVFP4 codec, the capability table."""
