"""Rows of text: where they come from, how they are split, and how a simulation deals them out."""
