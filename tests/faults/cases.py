"""The faults that a run has to survive, by number; a test of case 7 has `case_07` in its name."""

CASES = {
    1: "one rank killed at random steps",
    2: "all killed around or during a save",
    3: "a signal to one rank",
    4: "a second TERM, a KILL after a TERM",
    5: "disk full, failing or read-only",
    6: "damaged checkpoints",
    7: "damaged tars, headers and payloads",
    8: "repeated keys and names over sources",
    9: "bad samples of every sort",
    10: "few bad samples, too many bad samples",
    11: "shards missing, cut, stalled, endless, zeroed in the cache",
    12: "altered shards",
    13: "loader processes killed, stopped, hung",
    14: "a rank or its launcher killed or stopped, in every engine",
    15: "NaN in loss, gradient or input",
    16: "few or uneven shards, resumed at an epoch's end",
    17: "hostile data, checkpoints and tokenizers; secrets",
    18: "a soak under random faults",
}
