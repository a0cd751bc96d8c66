"""Memory of long videos (arXiv 2512.23851)."""
