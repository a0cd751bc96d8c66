"""One judge for all families: registered models side by side on the same held-out clips, prompts and seeds."""
