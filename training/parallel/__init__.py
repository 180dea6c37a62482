"""Training on many ranks: sequence parallelism over heads and chunks, and weights sharded by FSDP2."""
