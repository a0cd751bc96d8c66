"""Layouts of other tools: datasets written out for them, and theirs read as manifests."""
