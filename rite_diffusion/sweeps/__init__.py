"""Many trainings from one file: a base configuration, and axes along which settings change."""
