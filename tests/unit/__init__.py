"""No database, no socket."""
