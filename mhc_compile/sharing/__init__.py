"""Take a rewritten model elsewhere: folders that load without a trace, exported programs in plain ATen."""
