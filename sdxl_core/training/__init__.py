"""The SDXL trainer: started by `launch.launch_training`, run by `python -m sdxl_core.training` under accelerate.

launch.py         check inputs, start the processes, watch them, say how they ended
result.py         what makes two runs the same; the record that one is finished
training_set.py   the pictures, as meta_lat.json names them
__main__.py       one training process; processes.py: signals, the launching process's death, the outcome
loop.py           the run: load, step, log, save, finish; loss_average.py: avr_loss; watch.py: what it shows of itself
stepping.py       one step: forward, backward, update or leaving it out; guard.py: which steps are bad
updates.py        gradients into weights, after the backward pass or within it; ema.py: their average over time
text_outputs.py   of frozen text encoders, from disk
memory_plan.py    what a run needs, before anything is loaded; activations.py: what backward keeps; disk_guard.py
parallel.py       alone, DDP or FSDP2: who holds which piece of a weight
parts.py          what trains at which rate, and back to a checkpoint; denoiser.py: the models as one module
batches.py        micro-batches, made ahead
order.py          which samples form which batch            pure
captions.py       which text a sample has in an epoch       pure; caption_rules.py: by which rules; show_captions.py
objectives/       noise, timesteps, targets, loss           pure
randomness.py     all random numbers, by what they are for  pure
rates.py          which parameters share a learning rate; schedules.py: how it changes    pure
optimizer.py      any optimizer, one parameter at a time; optimizer_kinds.py: which; rounding.py: bf16 weights that move
run_state.py      all that moves, copied to main memory and put back
state.py          what a run continues from, on disk; saving.py: when, in a thread; reshard.py: for other process counts
previews.py       pictures from prompts
"""
