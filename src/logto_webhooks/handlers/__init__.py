"""The application's handlers: registration, jobs, execution."""
