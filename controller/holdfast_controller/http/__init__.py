"""The REST API: routes, problem documents, the event stream."""
