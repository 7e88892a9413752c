"""Recording the routing of a running model."""
