"""What happens, in order, over ports: no SQL, no framework."""
