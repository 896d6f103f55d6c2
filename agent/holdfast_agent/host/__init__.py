"""This host: its facts, its ledger, and the controllers it reports to."""
