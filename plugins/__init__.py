"""Custom ops: one folder an op (description, reference, kernel), the number codecs, and their benches."""
