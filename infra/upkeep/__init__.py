"""The upkeep of workspaces and machines: checks, estimates, cleaning."""
