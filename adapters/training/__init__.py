"""Training: rows and a method in, a checkpoint in PEFT's format out.

    job            the request, and the job with every default resolved
    recipes        the measured defaults of each method
    rows           JSON lines, CSV and inline rows, validated
    rendering      one row as text and as token ids
    selection      selects examples for training, for validation and for CPT's context
    examples       all rows as token ids, fitted to the maximum length
    method_config  merges the PEFT fields of a request into those of its recipe
    plan           resolves and validates a request and its rows
    batches        assigns examples to steps
    packed         the base model on one packed row of tokens
    loop           the training loop
    state          checkpoints of a run
    ranking        evaluation: loss and label ranking

Independent of HTTP, the jobs table and processes.
"""
