"""An HTTP service of what was trained: many adapters on one backbone, and learners on a CLIP, in dynamic batches."""
