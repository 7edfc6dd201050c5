"""The SDXL trainer: started by `launch.launch_training`, run by `python -m sdxl_core.training` under accelerate.

launch.py      check inputs, start the processes, watch them          (no torch)
loop.py        the run: load, step, log, save, finish
data.py        the training set and its micro-batches
order.py       which samples form which batch                         pure
captions.py    which text a sample has in an epoch                    pure
objective.py   noise, timesteps, loss                                 pure
optimizer.py   AdamW one parameter at a time; rounding.py its bf16    pure
denoiser.py    the models as one module
state.py       what a run continues from
previews.py    pictures from prompts
processes.py   signals, the launching process's death, the outcome
logs.py        TensorBoard and progress
"""
