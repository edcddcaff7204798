"""What an adversary learns from a federation, and what a hostile client does to it."""
