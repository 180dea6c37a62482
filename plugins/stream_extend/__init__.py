"""The ops norm_silu_extend and stream_extend: reference, kernel, plugin."""
