"""Parameters of who is told what about a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sdxl_core.sections import Section

Occasion = Literal["finished", "failed", "stuck"]


class NotifyOptions(Section):
    blocks: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")], ...] = Field(
        (),
        description="who is told: notification blocks of the Prefect server as TYPE/NAME, such as slack-webhook/team, "
        "sendgrid-email/me or custom-webhook/hook (make them in the browser under Blocks; secrets stay there)",
    )
    on: tuple[Occasion, ...] = Field(
        ("finished", "failed", "stuck"),
        description="when: finished; failed (crashed too, where it does not continue by itself); stuck (no progress)",
    )
    stuck_after_minutes: int = Field(
        60, ge=2, le=10_080, description="a running job that makes no progress for this long counts as stuck"
    )
