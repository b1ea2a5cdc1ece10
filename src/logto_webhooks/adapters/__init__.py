"""One outside thing each; they never import each other."""
