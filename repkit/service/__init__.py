"""The search service: an index that changes while it is searched, and HTTP over it."""
