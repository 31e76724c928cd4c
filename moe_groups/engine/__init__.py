"""What acts on an initialized engine."""
