"""Shards -> student: a plain PyTorch DDP trainer, no teacher in memory and no network.

    config        every setting of a run, one dataclass a group
    data          shards -> batches: order as a function of (seed, epoch), state of two integers
    chance        times and masks as a function of (train seed, step, sequence, position)
    conditioning  noise at the masked positions: input, readout, drafts
    backbone      the transformer that all students share, with Llama's parameter names
    students/     one file a student, one interface
    checkpoint    safetensors + JSON, atomic
    metrics       JSONL, TensorBoard, the progress line
    loop          the training loop

Imports noise; never ray, never pipeline. Runs where transformers is absent (saving an `ar` student for Hugging Face needs it).
"""
