"""What operators and fusion choices cost, and the choice that `fusion="auto"` makes by it. Imports nothing."""
