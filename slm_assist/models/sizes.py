"""Named model shapes."""
