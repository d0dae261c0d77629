"""One Lightning module a task."""
