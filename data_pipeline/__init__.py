"""Shards in, batches out: the same batches on any number of processes, workers and restarts."""
