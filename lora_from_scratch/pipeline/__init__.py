"""From raw data to a served adapter: one command, one folder, equal bytes."""
