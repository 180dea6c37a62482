"""One stream of video on several GPUs of a host: tokens, heads and rows are shared, below `Backend`."""
