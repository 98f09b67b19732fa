"""Where a journal lies: a file, or a PostgreSQL database."""
