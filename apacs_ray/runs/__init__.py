"""A run in its folder: the lease, commit markers, provenance."""
