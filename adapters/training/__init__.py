"""Training: rows and a method in, a checkpoint in PEFT's format out.

    job            what was asked for, and the same with every default resolved
    recipes        the measured defaults of each method
    rows           JSON lines, CSV and inline rows as plain values, checked
    rendering      one row as text and as token ids
    selection      which examples are trained on, held out, or in CPT's context
    examples       all rows as token ids, of a length that fits
    method_config  the PEFT fields of a request over those of its recipe
    plan           a request and its rows as a job that can run, or a refusal
    batches        which examples stand in which step
    packed         the base model on one packed row of tokens
    loop           the steps
    state          checkpoints of a run
    ranking        evaluation: which label is the most likely

No HTTP, no jobs table, no processes.
"""
