"""The kv_cache_write op: description, reference, kernel."""
