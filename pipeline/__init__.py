"""Corpus -> teacher -> shards.

The data flow of this room, one file each:

    config      the recipe: plain dataclasses, their docstrings are the command line's help
    embedded    the text that every Python carries: the default corpus
    corpus      files -> documents with their place in the corpus, split into train and held-out
    tokenizer   trains one, or takes the teacher's own
    packing     documents of tokens -> blocks that begin with BOS
    teacher     a Hugging Face causal LM -> log-probs in float32, a few positions at a time
    plan        what decides the numbers (identity), and which documents make which shard
    extract     one shard, from its documents to its receipt
    workers     all shards: Ray actors, resume, retries
    progress    one live line on a terminal, plain lines in a log
    verify      a finished dataset, checked file by file
    inspect     what a dataset is, in words or JSON
    card        README.md of a dataset

    python -m pipeline tokenizer|plan|extract|verify|inspect --config recipes/demo.yaml
"""
