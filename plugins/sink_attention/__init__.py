"""The sink_attention op: reference, kernel, plugin."""
