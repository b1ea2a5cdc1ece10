"""The crash harness: real processes, real HTTP, real kills; then the truth is compared."""
