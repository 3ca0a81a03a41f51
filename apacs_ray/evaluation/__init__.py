"""What a run is judged by: masks of every model, counts by tile, pooled metrics and their intervals."""
