"""The settings of a run and of a sweep, and how the command line and YAML files give them."""
