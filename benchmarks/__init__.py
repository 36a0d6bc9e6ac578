"""What is measured, and against whom: each file is one command that prints a table and writes JSON under results/.

    codec      python -m benchmarks.codec     bytes a token and what they buy: the sketch, top-k, dense fp16, the floor
    layout     python -m benchmarks.layout    bytes a token and read speed of format versions 1 and 2, and of what was not taken
    entries    ways to store kept entries, for layout
    rows       rows to lay out, for layout
    cross_entropy  python -m benchmarks.cross_entropy  how well kept entries, samples and top-k stand for the teacher in token-level distillation
    estimators     their weights and exact errors, for cross_entropy
    encode     python -m benchmarks.encode    what extraction adds to a teacher's forward, and how far from the machine's limit it is
    decode     python -m benchmarks.decode    what noise adds to a student's training step, from the sketch and from a teacher in the loop
    cost       python -m benchmarks.cost      GPU hours, bytes and requests of a dataset before it is made: an estimate, or from measured rates
    noise_cost python -m benchmarks.noise_cost  parameters and FLOPs that noise adds to a student, by option, at well-known sizes
    one_call   python -m benchmarks.one_call  what limits noise to text in one call: students of an exact teacher that differ in one thing each
    reach      what an ideal reader knows from the last few noises, and what a student takes from them, for one_call
    one_call_table  its tables
    wide_teacher  python -m benchmarks.wide_teacher  a teacher of a small one's function at a large one's cost, for eval accept
    packed     python -m benchmarks.packed    a forward of a causal LM on a CPU, its weights laid out once, and as torch has them
    loader     python -m benchmarks.loader    batches a second: ours, memory-mapped numpy, and other libraries' loaders on the same rows
    loaders    those readers, for loader
    scale      python -m benchmarks.scale     a second worker's help, and what a worker does beside its teacher
    driver     python -m benchmarks.driver    resuming 100,000 shards: seconds and memory until work starts
    machine    this machine's limits, times within rounds, peak memory
    teachers   the distributions that are measured: simulated ones at any vocabulary, a real causal LM's on a dataset's rows
    floor      what the kept entries cost an ideal coder that rebuilds the noise stream
    pages      python -m benchmarks.pages     the tables of docs/ablation.md and docs/results.md from the JSON here; `--check` names what differs
    page_tables  those tables: which figures, which rows, in which words
    results    their command line, their table, and their JSON with date, hardware and versions

A figure in the documentation names the command that printed it.
"""
