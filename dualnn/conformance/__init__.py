"""The runner of other projects' test suites against the engine. Empty for now."""
