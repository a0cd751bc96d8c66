"""One file a stage: its config, its objective, its run."""
