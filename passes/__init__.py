"""The passes over the captured graph, one pass a file."""
