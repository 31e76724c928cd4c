"""A live engine that saves what its groups are, and refuses or converts other groups."""
