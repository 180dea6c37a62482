"""The kv_cache_write op: reference, kernel, plugin."""
