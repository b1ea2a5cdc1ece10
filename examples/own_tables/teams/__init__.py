"""An application with users, teams and members of its own, which follow Logto's."""
