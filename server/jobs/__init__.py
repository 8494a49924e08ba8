"""Training jobs: the table of them, the processes that run them, and who watches those.

    states          states and transitions of a job, as data
    store           jobs, events, leases; one table for all processes
    config          what a worker is started with
    worker          a worker process: its limits, its signals, its end
    task            what it does: load, train, publish
    publishing      a trained adapter into the registry, once
    failures        an exception as a job's error
    worker_process  a worker process from its parent's side
    supervisor      claims jobs, runs a worker for each, ends them

No HTTP. Only `task` needs torch.
"""
