"""Local development: forward what Logto sends to an application here."""
