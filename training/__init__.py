"""Learn: data, teacher forcing, distillation, many GPUs; `models` holds the networks that all stages read."""
