"""What noise is and how it is kept.

The data flow of this room, one file each:

    philox      the counter-based stream: (seed, sequence, position, draw) -> exponentials E, equal on every device
    posterior   Algorithm 1 of the paper in exponential space: log-probs and a token -> the noise that chose it
    sketch      the epsilon-sketch: the few entries the teacher moved -> kept entries, and back to dense noise
    estimate    kept entries -> the teacher's cross-entropy for token-level distillation, without bias
    shard       kept entries and tokens -> one Arrow file, memory-mapped on the way back
    dataset     identity, plan, receipts, manifest: what makes a folder of shards a dataset
    storage     atomic writes and hashes
    compiled    torch.compile where there is a compiler, the same source eager where there is none

Imports torch, numpy and pyarrow, and nothing else of the project.
Shape suffixes: N positions that have noise, V vocabulary, K kept entries, B rows, L block length, R draws.
"""
