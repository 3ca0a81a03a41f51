"""Settings, sweeps and the command line that fills them."""
