"""What runs on a node: the Flower client, and the place where a site plugs in its own rows."""
