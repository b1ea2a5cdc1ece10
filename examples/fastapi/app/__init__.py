"""An application whose users sign in with Logto. Each gets a workspace and a mail."""
