"""The write of what a chunk leaves into a slot of the state."""
