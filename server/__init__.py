"""What runs the federation: the Flower server, and what a SuperLink needs around it."""
