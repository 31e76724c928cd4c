"""Finding and marking the experts of a model."""
