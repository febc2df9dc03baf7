"""Infrastructure: what scripts that train or run networks share. No algorithm is in here.

    flags.py         flags as dataclasses
    launch.py        from the command line to a script and back: signals, errors in one line
    run.py           a stage at work: randomness, metrics, progress, what stays on disk
    compute.py       devices, and rows in micro-batches: a weighted mean over rows, a map over rows
    precision.py     networks that compute in bfloat16 and remember in float32
    optimizer.py     AdamW and its schedule
    adapters.py      LoRA: what is trained, and folders of adapters
    nf4.py           QLoRA: frozen matrices in 4 bits
    models.py        what a stage starts from
    folders.py       networks as Hugging Face folders: one table per family of models
    safetensors.py   files of tensors
    checkpoints.py   the checkpoint from which an interrupted run goes on
    inputs.py        checksums of the files that a run reads
    files.py         JSON, models' folders by name, one run per folder; imports no PyTorch
    processes.py     several processes as one
    sharding.py      networks that several processes train together: DDP and FSDP
"""
