"""What a run that goes on from a saved state is told: that its rates follow another curve than before. Light."""

from __future__ import annotations

from sdxl_core.config import TrainConfig
from sdxl_core.training.schedules import lr_schedule, total_steps
from sdxl_core.training.state import newest_run

NOTICED = 0.01  # of the full rate


def schedule_warning(config: TrainConfig, *, steps_per_epoch: int) -> str | None:
    """A schedule is a curve over all steps, so a run that is made longer goes on at another rate; None: it does not.

    That is allowed, because nothing else could make a run longer; but a cosine that had ended begins to climb.
    """
    found = newest_run(config.out / "state")
    if found is None:
        return None
    step, run = found
    lengths = {name: run["config"][name] for name in ("max_train_steps", "max_train_epochs")}
    before = total_steps(config.model_copy(update=lengths), steps_per_epoch=steps_per_epoch)
    now = total_steps(config, steps_per_epoch=steps_per_epoch)
    was, is_now = (lr_schedule(config, total_steps=total)(step) for total in (before, now))
    if step >= now or abs(was - is_now) < NOTICED:
        return None
    key = "max_train_epochs" if config.max_train_epochs else "max_train_steps"
    ended = ", where it had ended," if step == before else ""
    return (
        f"{key}: the saved run was to have {before} steps, this one has {now}. lr_scheduler = {config.lr_scheduler} is "
        f"laid over all steps, so at step {step}{ended} the rates go from {was:.0%} to {is_now:.0%} of what is set. If "
        f"that is not meant, set {key} as it was; to add steps at a low rate, train from the finished model "
        f'(base_model) into another out folder, with a smaller learning_rate and lr_scheduler = "constant".'
    )
