"""The benchmark of sequence-parallel training, one file a concern."""
