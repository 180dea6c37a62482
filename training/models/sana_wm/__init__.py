"""The SANA-WM family; see training/models/family.py for the same file names in every family."""
