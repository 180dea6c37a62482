"""The experiment: BF16, NVFP4 after training and NVFP4 in training, students, sinks, drift and the FP4 cache, on digits.

`longtake experiment`; what it asks and how it measures is in docs/experiment.md.
"""
