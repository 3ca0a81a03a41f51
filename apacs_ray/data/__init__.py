"""Data on its way to training: images with masks, tiles and their shards, splits, and what is refused."""
