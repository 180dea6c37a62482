"""longtake check: exported and built networks against PyTorch, with the recipe's gates."""
