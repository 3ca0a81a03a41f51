"""Trained networks on images."""
