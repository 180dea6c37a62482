"""The sink_attention op: description, reference, kernel."""
