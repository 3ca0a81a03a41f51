"""What a run will cost, from a short sample."""
