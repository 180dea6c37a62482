"""Training data: the multi-shot digits and folders of clips."""
