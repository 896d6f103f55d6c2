"""The `holdfast` command: a client of the REST API."""
