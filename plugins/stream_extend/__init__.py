"""The ops norm_silu_extend and stream_extend: description, reference, kernel."""
