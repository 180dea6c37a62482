"""Released weights (Wan 2.2, LongLive 2.0, diffusers, Hugging Face) to our checkpoints: `longtake convert`.

Everything is read lazily: a converted tensor is a `Pending`, made when it is written and freed right after that.
"""
