"""From stored tiles to trained weights, without Ray."""
