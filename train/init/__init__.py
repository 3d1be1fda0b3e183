"""Starting from a pair that was trained before: by open_clip, by transformers, or by Duet."""

SOURCES = {
    "open_clip": "train.init.open_clip.read",
    "hf": "train.init.hf.read",
    "duet": "train.init.duet.read",
}
"""Kind of source in `init` -> what reads it: of the name after the colon, an `Origin`."""
