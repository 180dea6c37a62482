"""The gated depthwise convolution of the feed-forward network."""
