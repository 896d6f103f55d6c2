"""The contract between Holdfast's processes: words, records, messages, errors, typed client.

Touches nothing but HTTP in `client` and the terminal in `cli`. Imports no other room.

Start with `words` (identifiers and enumerations), then `records` (what etcd keeps), `messages`
(what agents and controllers say to each other) and `transitions` (which record may follow which).
"""

__version__ = "0.1.0"
