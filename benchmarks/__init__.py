"""What is measured, and against whom: each file is one command that prints a table and writes JSON under results/.

    codec      python -m benchmarks.codec     bytes a token and what they buy: the sketch, top-k, dense fp16, the floor
    teachers   the distributions that are measured: simulated ones at any vocabulary, a real causal LM's on a dataset's rows
    floor      what the kept entries cost an ideal coder that rebuilds the noise stream
    results    the JSON of a benchmark, with date, hardware and versions

A figure in the documentation names the command that printed it.
"""
