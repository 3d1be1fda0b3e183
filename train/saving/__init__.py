"""How a checkpoint comes to the disk while training goes on.

    all ranks, in the thread that trains   a snapshot: all that is saved is copied into memory of rank 0's host
    rank 0, in the same thread             the directory .step_<8 digits>.part, where an unfinished one is
    rank 0, in a thread of its own         files, hashes, sync, the name; `latest`, `best`; then old ones leave

Rank 0 alone writes, so what is whole there is whole. Its thread takes part in no collective: among those of training
it would meet the other ranks in another order on each of them. What it has met is told by the thread that trains, which
has something to agree on after every step.
"""
