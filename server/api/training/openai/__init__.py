"""Fine-tuning by OpenAI's names: `/v1/files` and `/v1/fine_tuning/jobs`, a thin layer over training.

    files     uploaded files: in, out, listed, deleted
    jobs      training jobs: created, followed, cancelled
    body      what a request may say, and what it comes to as a request for training
    data      uploaded files as rows
    replies   jobs and events as OpenAI's objects

Plan, store and worker are those of `/train`; nothing here trains or decides how.
"""
