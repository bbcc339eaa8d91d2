"""How fast an artifact decodes, beside other runtimes on the same checkpoint."""
