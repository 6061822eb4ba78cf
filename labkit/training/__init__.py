"""Training: many trainers that share one model.

Reading order: `run` (what `lk.fit` returns), `trainer` (the readable loop), `shared_model`, `staleness` (how a stale
gradient becomes an update), `batches`, `datasets` (with `data_files`, `columns`, `labels` and `images`).
"""
