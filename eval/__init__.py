"""Student -> samples -> figures, tables, plots: how good the text is, for how many function evaluations, against whom.

The data flow of this room, one file each:

    sampler      a masked student, noise and a number of function evaluations (NFE) -> tokens
    causal       any Hugging Face causal LM -> tokenizer, logits, and its own samples from the same noise
    samples      a request -> one Arrow file of tokens, sampled once and never again
    judge        tokens -> negative log-likelihoods under a causal LM that is not the teacher
    metrics      tokens and likelihoods -> perplexity, entropy, distinct-n, with bootstrap intervals
    frontier     perplexity against entropy -> perplexity at the entropy of real text, and ratios between systems
    reconstruct  posterior noise of held-out rows -> how much of the text comes back
    chain        the same comparison where the truth is known: an exact Markov teacher (markov; chain_figures and chain_page show it)
    study        the pieces of a report: which there are, which are there already, and how each is made
    report       all of it for several students -> report.json; page and plot make report.md and report.png of it

Perplexity can be bought with entropy, so no system is a point: each is traced, and compared at matched entropy.
Imports noise, trainer and, for a causal LM, transformers; nothing imports eval.
Shape suffixes: B rows of a batch, S sequences of a set, L positions, V vocabulary, N masked positions, R bootstrap replicates, P traced points.
"""
