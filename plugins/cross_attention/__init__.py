"""The op cross_attention: reference, and the library that runs it."""
