"""One file a model, and the layers that they share."""
