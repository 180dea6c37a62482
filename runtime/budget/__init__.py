"""How much memory a recipe takes, term by term, computed before any of it is allocated."""
