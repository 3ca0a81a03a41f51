"""Whole slides: how they are found, opened and read, where their tissue lies, and which tiles they give."""
