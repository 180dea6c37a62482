"""Custom ops: one folder an op (reference, kernel, plugin), the number codecs, and their benches."""
