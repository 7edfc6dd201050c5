"""`sdxl-flows up | status | down`: a local Prefect server, its deployments and a worker, started and ended together."""
