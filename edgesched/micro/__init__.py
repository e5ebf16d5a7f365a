"""The small model family that ships with the project: a drawn world, a judge and three pipelines."""
