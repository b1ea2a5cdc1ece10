"""What of the pages in `docs` is made: options, events, states; and the examples, which are run."""
