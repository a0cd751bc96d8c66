"""What keeps a workspace and a machine in order: checks, estimates, cleaning."""
