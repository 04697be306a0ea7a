"""waterfill compresses a neural network to the exact size its user names."""
