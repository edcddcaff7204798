"""Sweeps: many runs from one settings file, side by side, each in a folder of its own that is kept."""
