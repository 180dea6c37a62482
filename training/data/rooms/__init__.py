"""Rooms that are rendered with the exact pose, depth and intrinsics of every frame: a world with nothing to download."""
