"""Flow: the whole path, pictures and tags in, fine-tuned SDXL checkpoint out."""

from prefect import flow

from flows.cache_latents import cache_latents
from flows.finetune import finetune
from flows.merge_tags import merge_tags
from flows.resuming import resuming
from flows.service.notifications import notify_about_this_run
from flows.subset import subset
from sdxl_core.config import JobConfig
from sdxl_core.preflight import check_job
from sdxl_core.refs import RunRef
from tasks.records import finish_run, record_stage


@flow(name="pipeline", description=JobConfig.__doc__)
@resuming
def pipeline(job: JobConfig) -> RunRef:
    notify_about_this_run(job.notify)
    check_job(job)
    picked = None
    if job.subset.query:
        picked = subset(job.subset_config())
        record_stage(job.out, "subset", job.subset_config(), picked)

    metadata = merge_tags(job.merge_config(picked))
    record_stage(job.out, "merge-tags", job.merge_config(picked), metadata)

    latents = cache_latents(job.latents_config(picked))
    record_stage(job.out, "cache-latents", job.latents_config(picked), latents)

    checkpoint = finetune(job.train_config())
    record_stage(job.out, "train", job.train_config(), checkpoint)
    return finish_run(job)
