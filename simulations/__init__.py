"""Experiments as TOML, and the scripts that measure."""
