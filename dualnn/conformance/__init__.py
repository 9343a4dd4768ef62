"""Third-party suites against the engine: PyTorch's op and module databases, judged by differences.

``dualnn conformance`` prints the table; the committed ones are in ``tables/``.
"""
