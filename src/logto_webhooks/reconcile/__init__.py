"""Compare with Logto: recover, refetch, reconcile."""
