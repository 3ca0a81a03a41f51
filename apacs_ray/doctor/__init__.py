"""Checks whether a run would work here: packages, devices, disks, stores and the cluster."""
