"""longtake: train, export, compile and stream long multi-shot video in 4 bits."""

__version__ = "0.1.0"
