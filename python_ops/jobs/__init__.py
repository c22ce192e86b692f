"""Compressing a checkpoint or a model in memory: the job, its workers, its memory, what is remembered of it.

A job knows methods and models; a method does not know by which job it is run."""
