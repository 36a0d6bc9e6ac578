"""Student -> samples -> figures, tables, plots: how good the text is, for how many function evaluations, against whom.

The data flow of this room, one file each:

    sampler      a masked student, noise and a number of function evaluations (NFE) -> tokens; decoding: its settings; stream: its draws;
                 schedules, adaptive: how many positions a forward reveals
    blocks       the same for a block diffusion student: block after block with a KV cache, to any length
    causal       any Hugging Face causal LM -> tokenizer, logits, and its own samples from the same noise
    prompts      a file of prompts and texts with blanks -> what is given of each row; writers: every student that can fill it (causal_writers: from
                 left to right, alone or with drafts)
    sample_set   the settings of `sample` -> a set of rows, with the forwards that each took
    samples      a request -> one Arrow file of tokens, sampled once and never again
    speculative  a drafter's guesses, judged by one forward of the teacher -> exactly the teacher's samples in fewer of its calls
    drafters     every student that can guess; drafting: one from a folder, for a causal LM; lockstep: rows of different lengths on one cache;
                 referee: which guesses stand, with noise and without
    accept       drafters -> accepted tokens per teacher call, and time (accept_rows: what is written; accept_figures: what is made of it)
    judge        tokens -> negative log-likelihoods under a causal LM that is not the teacher; reread: rows in another model's own tokens
    metrics      tokens and likelihoods -> perplexity, entropy, distinct-n, with intervals; repetition: repeated n-grams, loops, lengths
    features     tokens -> one vector a text; mauve: two sets of vectors -> how near they are
    frontier     perplexity or MAUVE against entropy -> its value at the entropy of real text, and ratios between systems
    reconstruct  posterior noise of held-out rows -> how much of the text comes back, and where
    exact        a teacher that is known exactly (markov, languages), its texts and noise datasets; taught: students of it, equal in all but noise
    chain        the same comparison where the truth is known: a Markov teacher (chain_figures and chain_page show it)
    truth        small known languages beside the exact limit of factorised decoding (factorised, integrated; truth_figures, truth_page, truth_plot)
    systems      a folder of students -> how each is traced and draws its rows; timing: their wall time on this machine
    study        the pieces of a report: which there are, which are there already, and how each is made; cautions: what a reader must know
    tracing      the points of each frontier that were asked for, and those that refine it where it is read
    ablation     students that differ in one thing, trained and compared over seeds
    likelihood   log p of a continuation; answering: a student that answers in text; zero_shot: as lm-eval asks it
    llm_judge    a language model's verdict on samples (chat asks it, questions are what, judgements what its answers add up to; ledger keeps them)
    single       one student at a time
    report       all of it for several students -> report.json; page says it, plot draws it, render makes Markdown and one HTML file of it

Perplexity can be bought with entropy, so no system is a point: each is traced, and compared at matched entropy.
Imports noise, trainer and, for a causal LM, transformers; nothing imports eval.
Shape suffixes: B rows of a batch, S sequences of a set, L positions, V vocabulary, N masked positions, R bootstrap replicates, P traced points.
"""
