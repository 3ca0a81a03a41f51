"""What tests and benchmarks share: whole runs, clusters of several raylets on one machine, a store that fails."""
