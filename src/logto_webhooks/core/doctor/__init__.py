"""What `doctor` finds: decided from facts that somebody else gathered. Pure."""
