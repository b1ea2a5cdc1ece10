"""The pages of `docs/commands`: what they say of options is made, their examples are run."""
