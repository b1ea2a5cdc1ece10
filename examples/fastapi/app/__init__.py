"""An application with users of Logto: each gets a workspace, a greeting, and can write notes."""
