"""What Dynamo tells a backend, and what it tells nobody: frames, skipped frames, errors, the inner compiler."""
