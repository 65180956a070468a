"""What is said about a model: what was found and rewritten, what it is predicted to cost."""
