"""Synthetic Pap smears with exact masks, and slides of them."""
