"""Methods of every family, compared on one federation each for text, a chat model and images."""
