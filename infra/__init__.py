"""The face: CLI, recipes, the stage graph, the run database and the report."""
