"""Training jobs: worker processes and their supervision.

    config          configuration and exit statuses of a worker
    worker          a worker process: limits, signals, exit
    task            the job itself: load, train, publish
    publishing      publishes a trained adapter, at most once
    failures        maps an exception to a job's error
    worker_process  the parent's handle of a worker process
    supervisor      claims jobs, runs a worker for each, settles them

Jobs, their states and their rows are kept in `server.store`. Independent of HTTP. Only `task` needs torch.
"""
