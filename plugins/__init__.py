"""Custom ops: one folder a plugin (kernel, reference, plugin), the NVFP4 codec, the capability table."""
