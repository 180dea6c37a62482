"""The engine spec, recipes, build, profile and manifest."""
