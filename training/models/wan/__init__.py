"""The Wan2.2 / LongLive 2.0 family: DiT, VAE, their network specs, cache slots and rotary positions."""
