"""Corpus -> teacher -> shards.

The data flow of this room, one file each:

    config      the recipe: plain dataclasses, their docstrings are the command line's help
    embedded    the text that every Python carries: the default corpus
    files       patterns, URIs and names of datasets -> files, here or on the hub or in a store
    formats     one file -> its documents, from any place on, hashed in the same pass
    clean_up    text that a corpus's authors took apart, put together again
    corpus      files -> documents with their place in the corpus, split into train and held-out
    divide      a corpus -> shards, in one pass, several files at a time
    tokenizer   trains one, or takes the teacher's own
    packing     documents of tokens -> blocks that begin with BOS
    teacher     a Hugging Face causal LM -> log-probs in float32, a few positions at a time; packed: its weights as a CPU likes them
    plan        what decides the numbers (identity), and which documents make which shard
    claim       plan.json goes first, where nobody's own files are in the way
    standing    a plan that is there already: found again by listing, extended by new files
    estimate    how much a plan will make, before any teacher runs
    pilot       the teacher on some rows of a plan: speed, bytes, and how far the corpus is from what it would write
    extract     one shard, from its documents to its receipt
    making      what happens to a shard meanwhile: rows left out, micro-batches in halves, where the time goes
    memory      what fits in memory, and what to do where it does not
    prompts     the plan of text that the teacher writes: rules, and which prompts make which shard
    generate    one shard that the teacher writes from the noise
    replay      is it what the teacher writes? one parallel forward over the rows
    worker      a teacher held by a process, and the shards in its hands
    workers     all shards: who makes which, resume, retries, quarantine
    cluster     Ray, started here or joined, and room for how many workers
    progress    one live line on a terminal, plain lines in a log
    status      how far a dataset is, from its receipts, while it is made elsewhere
    verify      a finished dataset, checked file by file, many shards at a time
    soundness   one shard, row by row: ranges, order, and what the noise stream explains
    deep        the teacher run again on random rows, and the bound at every entry
    trust       one verdict: what is proven, what was measured, what is only claimed
    inspect     what a dataset is, in words or JSON
    glimpse     a look into a few of its shards: rows with their text, kept entries by position
    uses        which students and objectives it feeds, which not, and why
    card        README.md of a dataset; bare_reader: the Python in it, which needs pyarrow and numpy alone
    derive      whole shards of other datasets, byte for byte: merge, subset, split
    rewrite     the same rows in new files: reshard, some rows, another format version or compression
    dense       noise as numbers
    transfer    push and pull, in the published form
    stages      the commands that take a recipe; sharing: those that need none; lease: one driver at a time

    python -m pipeline tokenizer|plan|extract|generate|verify|replay|inspect|status --config recipes/demo.yaml
    python -m pipeline merge|subset|split|reshard|convert|export|card|push|pull DATASET ...
"""
