"""Serving: images made for requests as they come."""
