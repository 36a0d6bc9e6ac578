"""What noise is and how it is kept.

The data flow of this room, one file each:

    philox      the counter-based stream: (seed, sequence, position, draw) -> exponentials E, equal on every device
    posterior   Algorithm 1 of the paper in exponential space: log-probs and a token -> the noise that chose it
    sketch      the epsilon-sketch: the few entries the teacher moved -> kept entries
    candidates  the fast search for those entries, from logits, without exp
    decode      kept entries -> noise, made where it is read, a chunk of the vocabulary at a time
    estimate    kept entries -> the teacher's cross-entropy for token-level distillation, without bias
    shard       kept entries and tokens -> one Arrow file, memory-mapped on the way back
    identity    everything that decides a dataset's numbers, and its hash
    lineage     which datasets a dataset was made from, and who made each of its shards
    receipt     what was committed as one shard
    commit      a shard appears whole, once, whoever else writes it at the same time
    dataset     plan and manifest: what makes a folder of shards a dataset
    seal        what no shard's hash covers: the manifest's own hash, and those of the small files
    unpacked    how much memory a record batch takes, read before Arrow unpacks it
    folder      where a dataset is: this machine or a store, behind the few operations that a dataset needs
    local       such a folder on this machine; bucket: at s3:// or gs://
    stores      s3:// and gs://: addresses, retries, errors in words
    hub         hf://: a dataset on the Hugging Face Hub
    storage     atomic writes and hashes
    secrets     keys and tokens reach neither files nor messages
    compiled    machine code where it can be had: torch.compile, numba; the same results without
    native      the stream's words and the search, for numba

Imports torch, numpy, pyarrow, numba where it is installed, and nothing else of the project.
Shape suffixes: N positions that have noise, V vocabulary, K kept entries, B rows, L block length, R draws.
"""
