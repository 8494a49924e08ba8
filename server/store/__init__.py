"""What a data directory holds: database, adapters, jobs, files, API keys.

database, schema, tables, migrations   the SQLite file and its schema
registry, adapter_rows, blobs, staging, combining    adapters: names, versions, bytes
directories, folder_watch              adapters that an operator lays into folders
jobs, job_states, job_files            training jobs, their states and their rows
files                                  files uploaded for fine-tuning
keys, key, key_ring, rates, caller     API keys, their cache, and the key of the running request
data_dir                               checks and clean-up at the start
"""
