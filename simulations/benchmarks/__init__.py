"""Scripts that measure what the project claims."""
