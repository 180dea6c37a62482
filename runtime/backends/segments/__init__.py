"""The segmented backend: a network cut at its custom ops, its buffers in one arena, its segments run in order."""
