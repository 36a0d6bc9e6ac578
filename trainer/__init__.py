"""Shards -> student: a plain PyTorch DDP trainer, no teacher in memory and no network.

    config        every setting of a run, one dataclass a group
    data          shards -> batches: order as a function of (seed, epoch), state of two integers; batch: whole arrays and their noise
    order         sample number -> row; mixture: several datasets as one; shards: row -> where it is mapped
    cache         shards of datasets at a URI, on this machine; gather: rows at addresses -> whole arrays; native: its machine code
    chance        times and masks as a function of (train seed, step, sequence, position)
    conditioning  noise at the masked positions: input, readout, drafts; marginal: noise with another marginal; streamed: in chunks
    objectives    what logits are held against: the token, the teacher, or both
    backbone      the transformer that all students share, with Llama's parameter names; llama: saved as one
    attention     who sees whom, and the keys and values that sampling keeps; layout: the [x_t ; x_0] input of block diffusion
    clip          the interval of mask rates in which block diffusion's loss varies least
    frozen        a Hugging Face causal LM that a student stands on; heads: what stands on it
    students/     one file a student, one interface; declared: a stranger's student is as large as its weights
    dit           the network of the published MDLM and BD3-LM checkpoints, under the same calls
    initialise    first weights from somebody else's; foreign reads their files, published folds their networks into ours
    setup         what a run is made of; recipe: which settings decide its numbers, and the refusal of another run
    average       averaged weights (EMA) of what is trained
    heldout       the held-out evaluation and its probe
    guard         stops at losses that are no numbers or explode, and names the sequences
    checkpoint    safetensors + JSON, atomic
    metrics       JSONL, TensorBoard, Weights & Biases, the progress line
    loop          the training loop; distributed: the sums that cross processes
    estimate      what a run will cost before it starts; flops, memory, heads_cost: its formulas; skeleton: a frozen backbone's shape alone
    export        a student for others, with a model card; standalone: the 20 lines of torch in it

Imports noise; never ray, never pipeline. Runs where transformers is absent
(saving an `ar` student for Hugging Face and the backbone of a `medusa` student need it).
"""
