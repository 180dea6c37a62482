"""`longtake bench`: how fast a recipe runs at full size, on random weights, against plain PyTorch and the roofline."""
