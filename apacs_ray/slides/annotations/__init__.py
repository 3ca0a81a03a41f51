"""Annotations of slides: the formats that are read, and polygons as masks."""
