"""Training stages: each knows its modules, its loss and its evaluation."""
