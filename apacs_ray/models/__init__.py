"""The networks, their weights, and the list of them."""
