"""Apply deliveries from the inbox to records and mirror tables."""
