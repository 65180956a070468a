"""What the search for residual adds knows of adds that are none."""
