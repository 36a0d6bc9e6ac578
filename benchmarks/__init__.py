"""What is measured, and against whom: each file is one command that prints a table and writes JSON under results/.

    codec      python -m benchmarks.codec     bytes a token and what they buy: the sketch, top-k, dense fp16, the floor
    layout     python -m benchmarks.layout    bytes a token and read speed of format versions 1 and 2, and of what was not taken
    entries    ways to store kept entries, for layout
    rows       rows to lay out, for layout
    cross_entropy  python -m benchmarks.cross_entropy  how well kept entries, samples and top-k stand for the teacher in token-level distillation
    estimators     their weights and exact errors, for cross_entropy
    teachers   the distributions that are measured: simulated ones at any vocabulary, a real causal LM's on a dataset's rows
    floor      what the kept entries cost an ideal coder that rebuilds the noise stream
    results    the JSON of a benchmark, with date, hardware and versions

A figure in the documentation names the command that printed it.
"""
