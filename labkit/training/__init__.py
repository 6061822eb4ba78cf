"""Training: many trainers that share one model.

Reading order: `fit` (its options), `run` (what it returns) with `run_record` and `active_runs`, `trainer_threads` with
`turns` and `failures` (how a run says why it ended), `trainer` (the readable loop), `forward` with `losses` and
`given_losses` (those of the caller), `shared_model` with `replicas` and `optimizers`, `staleness` (how a stale gradient
becomes an update), `batches`, `datasets` (with `data_files`, `columns`, `labels` and `images`; `text` with `tokens`;
and `hub`). Besides: `metrics` and `validation`; `saving`, `run_folder` (its files) and `serialization` (without
pickle), which `labkit.resuming` reads.
"""
