"""Flow: read every byte of a latent set and hold it against what was written; for a schedule."""

from prefect import flow

from flows.resuming import resuming
from sdxl_core.config import VerifyLatentsConfig
from sdxl_core.refs import VerifiedRef
from tasks.latents import verify_latents as verify


@flow(name="verify-latents", description=VerifyLatentsConfig.__doc__)
@resuming
def verify_latents(config: VerifyLatentsConfig) -> VerifiedRef:
    return verify(config)
